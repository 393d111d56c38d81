# The virtual environment is made when it is missing, and again when what it installs has changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
INSTALLED := $(VENV)/installed-$(EXTRAS)
WORKDIR ?= runs/quickstart

.PHONY: install quickstart figures test test-slow lint clean

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	touch $@

# Trains on number phrases, translates phrases that it has never seen, and shows what a step costs.
quickstart: $(INSTALLED)
	$(BIN)/python train.py --config=configs/quickstart.py --workdir=$(WORKDIR)
	head -n 500 data/number_phrases/test.en.txt > $(WORKDIR)/test.en.txt
	head -n 500 data/number_phrases/test.de.txt > $(WORKDIR)/test.de.txt
	$(BIN)/python decode.py --workdir=$(WORKDIR) --input=$(WORKDIR)/test.en.txt \
	  --output=$(WORKDIR)/test.out.txt --reference=$(WORKDIR)/test.de.txt
	@echo "Ten of them:"
	@paste -d '|' $(WORKDIR)/test.en.txt $(WORKDIR)/test.out.txt | head -n 10 | sed 's/|/  ->  /'
	$(BIN)/python decode.py --benchmark --config=configs/quickstart.py --batch_sizes=32 \
	  --context_lengths=512 --output_dir=$(WORKDIR)

# The README's picture and table, and the others, from the last run that was kept: measures nothing.
figures: $(INSTALLED)
	$(BIN)/python -m mqa_jax.measure.report docs/benchmark.json docs --readme=README.md

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not slow"

# One process, since what is slow uses both cores by itself.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
