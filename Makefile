# The virtual environment is made when it is missing, and what it installs again when that has
# changed. It is of the newest Python that runs here, pyenv's too (python3.13 may be on the path and
# only say that it is not installed); PYTHON= names another, for which it is made anew.
VENV ?= .venv
BIN := $(VENV)/bin
EXTRAS ?= dev
INSTALLED := $(VENV)/installed-$(EXTRAS)$(if $(PYTHON),-$(notdir $(PYTHON)))
WORKDIR ?= runs/quickstart

VERSION := -c 'import ensurepip, sys; print("%d.%d" % sys.version_info[:2])'
NEWEST = $(shell for version in 3.13 3.12; do \
  for python in python$$version "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python; do \
    test "$$("$$python" $(VERSION) 2>&1)" = $$version && echo "$$python" && exit; \
  done; done)
CHOSEN = $(or $(PYTHON),$(NEWEST),$(error Neither Python 3.12 nor 3.13 runs here: name another, PYTHON=/path/to/python))

.PHONY: install quickstart figures test test-slow docs lint clean

install: $(INSTALLED)

$(INSTALLED): setup.cfg setup.py pyproject.toml
	@test -x $(BIN)/python $(if $(PYTHON),&& test "$$($(BIN)/python $(VERSION))" = "$$($(PYTHON) $(VERSION))") || \
	  { python="$(CHOSEN)"; echo "$(VENV): $$("$$python" --version), $$python"; "$$python" -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[$(EXTRAS)]"
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

# The README's picture and table, and the docs' others, from the runs that were kept: measures nothing.
figures: $(INSTALLED)
	$(BIN)/python -m mqa_jax.measure.report docs/benchmark.json docs --readme=README.md
	$(BIN)/python -m mqa_jax.measure.report docs/h200_context_8192.json docs/h200_context_8192
	$(BIN)/python benchmarks/learning_curves.py --output=docs/multi30k_curves.png docs/multi30k_curves.json

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m "not slow" --durations=10

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m slow --durations=20

# Into site/; `$(BIN)/mkdocs serve` shows it while it is written.
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info
