"""How good the variants of a config become: several runs of each, side by side in one program.

    python benchmarks/quality.py --config=configs/multi30k.py:multi_query --data=DIR --output=FILE
    python benchmarks/quality.py FILE [FILE ...]

The first trains the config once for each of `--seeds`, as train.py does with that
`--config.train.seed`: the same first weights, batches and dropout, to the rounding of sums. A small
model leaves a GPU idle, and several in one program cost it little more than one. `--data` is what
`mqa_jax.data.prepare` made. With `--average=N` the mean of the last N checkpoints
(`checkpoint_every` steps apart) is evaluated, and not the last weights.

`--weights=FILE` keeps the weights of all the runs, and `--teacher=FILE`, with `--teacher_config`,
is such a file of as many others: each run learns from that of its place, with the share
`--config.train.distillation`.

The second prints tables of such files, as Markdown: means and standard deviations over seeds, and
each file against the first one. ln(perplexity): a t-test of the differences by seed. BLEU: paired
bootstrap by sacrebleu, over the outputs of all seeds, one behind the other.
"""

import functools
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sacrebleu
from absl import app, flags, logging
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags
from sacrebleu.significance import PairedTest
from scipy import stats

from mqa_jax.core.sharding import make_mesh
from mqa_jax.data import loader
from mqa_jax.data.manifest import Manifest
from mqa_jax.data.text import read_lines
from mqa_jax.decode.beam import beam_search
from mqa_jax.decode.lines import LineDecoder
from mqa_jax.decode.rules import only_text
from mqa_jax.decode.search import greedy
from mqa_jax.model.transformer import Model, build_model
from mqa_jax.train.evaluate import add_up
from mqa_jax.train.loss import mean_metrics
from mqa_jax.train.optimizer import build_optimizer
from mqa_jax.train.setup import schedule_of, step_options
from mqa_jax.train.state import TrainState, init_state
from mqa_jax.train.step import dropout_key, make_eval_step, make_gradients, make_update
from mqa_jax.train.workdir import load_row_tokenizer

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py:VARIANT")
DATA = flags.DEFINE_string("data", None, "Prepared data of that config.")
OUTPUT = flags.DEFINE_string("output", None, "Where the figures go, as JSON.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Of a run each.")
AVERAGE = flags.DEFINE_integer("average", 1, "Checkpoints, the last ones.", lower_bound=1)
BEAMS = flags.DEFINE_integer("beam_size", 4, "Beside greedy.", lower_bound=2)
WEIGHTS = flags.DEFINE_string("weights", None, "Where the runs' weights go, as .npz.")
TEACHER = flags.DEFINE_string("teacher", None, "Weights to distil; see above.")
TEACHER_CONFIG = config_flags.DEFINE_config_file("teacher_config", help_string="Of these.")
SPLITS = flags.DEFINE_list("splits", ["validation", "test"], "To evaluate.")
TRANSLATED = flags.DEFINE_list("translated", ["test"], "Those of which BLEU is told, too.")

CHUNK = 20  # Steps of one call.


def train(
    config: ConfigDict,
    data: Path,
    seeds: Sequence[int],
    *,
    average: int = 1,
) -> tuple[Model, Any]:
    """The model's structure, and the weights of a run for each seed, stacked.

    Args:
      average: of how many checkpoints, the last ones, the weights are the mean.
    """
    mesh = make_mesh(devices=jax.devices()[:1])
    build = functools.partial(build_model, config.task, config.model.to_dict())
    drawn = [init_state(build, optimizer_of(config), mesh, seed) for seed in seeds]
    params = jax.tree.map(lambda *x: jnp.stack(x), *(state.params for _, state in drawn))
    model = drawn[0][0]
    teacher = None
    if TEACHER.value is not None:
        structure = abstract(TEACHER_CONFIG.value)
        teacher = structure, load(Path(TEACHER.value), structure)
    return model, Training(config, data, model, teacher)(params, seeds, average=average)


def abstract(config: ConfigDict) -> Model:
    """The structure of a config's model."""
    return nnx.eval_shape(
        lambda: build_model(config.task, config.model.to_dict(), rngs=nnx.Rngs(0))
    )


def save(path: Path, params: Any) -> None:
    """Writes weights, stacked ones too."""
    np.savez(path, *map(np.asarray, jax.tree.leaves(params)))


def load(path: Path, model: Model) -> Any:
    """What `save` has written of a model of that structure."""
    with np.load(path) as file:
        leaves = [jnp.asarray(file[name]) for name in file.files]
    return jax.tree.unflatten(jax.tree.structure(nnx.as_pure(nnx.state(model))), leaves)


def optimizer_of(config: ConfigDict) -> optax.GradientTransformation:
    """That of a config, with a learning rate of 1."""
    return build_optimizer(config.train.optimizer, 1.0, weight_decay=config.train.weight_decay)


class Training:
    """Trains several runs of a config at once.

    Args:
      model: its structure.
      teacher: the structure and the stacked weights of models to learn from, if any.
    """

    def __init__(
        self,
        config: ConfigDict,
        data: Path,
        model: Model,
        teacher: tuple[Model, Any] | None = None,
    ):
        self._data, self._optimizer = data, optimizer_of(config)
        mesh = make_mesh(devices=jax.devices()[:1])
        structure, self._teacher_params = (None, None) if teacher is None else teacher
        gradients = make_gradients(
            model, mesh, teacher=structure, ids=Manifest.read(data).ids, **step_options(config)
        )
        update = make_update(self._optimizer, gradients)

        def one(
            state: TrainState, batch: Any, seed: Any, rate: Any, teacher_params: Any
        ) -> tuple[TrainState, Any]:
            key = dropout_key(seed, state.step)
            new, metrics = update(state, batch, key, teacher_params)
            # All that an optimizer does is in proportion to its learning rate, so that the rate
            # need not be a part of the program, of which there would be one for every schedule.
            params = jax.tree.map(lambda x, y: x + rate * (y - x), state.params, new.params)
            state = TrainState(new.step, params, new.opt_state)
            return state, (metrics["loss"], metrics["skipped"])

        def run(
            state: TrainState, batches: Any, seeds: Any, rates: Any, teacher_params: Any
        ) -> tuple[TrainState, Any]:
            def step(state: TrainState, batch_and_rates: Any) -> tuple[TrainState, Any]:
                return jax.vmap(one)(
                    state, batch_and_rates[0], seeds, batch_and_rates[1], teacher_params
                )

            return jax.lax.scan(step, state, (batches, rates))

        # Said, as else it would be compiled anew for a state that it has given.
        self._place = NamedSharding(mesh, PartitionSpec())
        self._run = jax.jit(run, donate_argnums=0, out_shardings=self._place)
        self._config = config

    def __call__(
        self,
        params: Any,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        schedule: optax.Schedule | None = None,
        factors: Sequence[float] | None = None,
        average: int = 1,
    ) -> Any:
        """The weights that runs end with, stacked.

        Args:
          params: those that they begin with, stacked; they are not used up.
          seeds: of each.
          steps: the config's when None.
          schedule: likewise.
          factors: of each one's learning rate.
          average: as for `train`.
        """
        settings, runs = self._config.train, len(seeds)
        steps = steps or settings.steps
        schedule = schedule or schedule_of(self._config)
        scale = np.ones(runs) if factors is None else np.asarray(factors)
        begin = TrainState(
            jnp.zeros(runs, jnp.int32),
            jax.tree.map(jnp.copy, params),
            jax.vmap(self._optimizer.init)(params),
        )
        state = jax.device_put(begin, self._place)
        streams = {
            seed: loader.train_batches(self._data, batch_size=settings.batch_size, seed=seed)
            for seed in sorted(set(seeds))
        }
        order = [list(streams).index(seed) for seed in seeds]
        saved = {steps - i * settings.checkpoint_every for i in range(average)}
        if min(saved) < 1:
            raise ValueError(
                f"--average={average}: {steps} steps have not so many checkpoints "
                f"{settings.checkpoint_every} steps apart: lower --config.train.checkpoint_every"
            )
        ends = sorted({*range(CHUNK, steps, CHUNK), *saved})

        def chunk(done: int, end: int) -> tuple[Any, Any]:
            rows = [[next(stream) for stream in streams.values()] for _ in range(done, end)]
            batches = {
                name: np.stack([[batch[name] for batch in row] for row in rows])[:, order]
                for name in rows[0][0]
            }
            rates = np.asarray(schedule(np.arange(done, end)))[:, None] * scale
            return batches, rates.astype(np.float32)

        total: Any = None
        began = time.perf_counter()
        with ThreadPoolExecutor(1) as pool:  # Reads while the device computes.
            spans = [*zip([0, *ends[:-1]], ends, strict=True), None]
            waiting = pool.submit(chunk, *spans[0])
            for span, following in itertools.pairwise(spans):
                given = waiting.result()
                if following is not None:
                    waiting = pool.submit(chunk, *following)
                state, (losses, skipped) = self._run(
                    state, given[0], np.asarray(seeds, np.uint32), given[1], self._teacher_params
                )
                done, end = span
                if end in saved:
                    now = jax.tree.map(jnp.copy, state.params)
                    total = now if total is None else jax.tree.map(jnp.add, total, now)
                if end // 500 > done // 500 or end == steps:
                    if np.any(skipped):
                        raise ValueError(f"a step up to {end} was skipped: lower the learning rate")
                    seconds, loss = time.perf_counter() - began, np.mean(losses[-1])
                    print(f"step {end}, {seconds:.0f} s, loss {loss:.3f}", flush=True)
        return jax.tree.map(lambda x: x / len(saved), total)


class Evaluation:
    """The figures of weights on some splits, with the texts behind them."""

    def __init__(
        self,
        config: ConfigDict,
        data: Path,
        model: Model,
        *,
        splits: Sequence[str],
        translated: Sequence[str] = (),
        beam_size: int | None = None,
    ):
        mesh = make_mesh(devices=jax.devices()[:1])
        tokenizer = load_row_tokenizer(data)
        searches: dict[str, Any] = {"greedy": greedy}
        if beam_size is not None:
            searches["beam"] = functools.partial(beam_search, beam_size=beam_size)
        vocab_size = model.config.vocab_size
        rules = only_text(tokenizer.vocab_size, vocab_size, (tokenizer.ids.eos,))
        self._eval_step = make_eval_step(model, mesh, ids=tokenizer.ids)
        self._batches, self._lines, self._decoders = {}, {}, {}
        for split in splits:
            size = config.evaluate.batch_size
            self._batches[split] = list(loader.eval_batches(data, split, batch_size=size))
            sides = filter(None, (config.data.source, config.data.target))
            self._lines[split] = [read_lines(data / f"{split}.{side}.txt") for side in sides]
            names = searches if split in translated and config.task == "translation" else ()
            self._decoders[split] = {
                name: LineDecoder(
                    model,
                    tokenizer,
                    search=functools.partial(searches[name], eos_id=tokenizer.ids.eos, rules=rules),
                    batch_size=len(self._lines[split][0]),
                    bos_id=tokenizer.ids.bos or 0,
                )
                for name in names
            }

    def __call__(self, params: Any) -> dict[str, dict[str, Any]]:
        """By split."""
        return {split: self._of(split, params) for split in self._batches}

    def _of(self, split: str, params: Any) -> dict[str, Any]:
        *sources, target = self._lines[split]
        sums = add_up(
            jax.device_get([self._eval_step(params, batch) for batch in self._batches[split]])
        )
        figures = dict(
            ln_perplexity=float(mean_metrics(sums)["ln_perplexity"]),
            # A sentence's end counts as a word.
            ln_perplexity_word=float(sums["nll"] / sum(len(line.split()) + 1 for line in target)),
        )
        for name, decoder in self._decoders[split].items():
            outputs = list(decoder.texts(params, sources[0]))
            for suffix, is_lowercased in (("", False), ("_lowercased", True)):
                metric = sacrebleu.BLEU(lowercase=is_lowercased)
                score = metric.corpus_score(outputs, [target]).score
                figures[f"{name}_bleu{suffix}"] = score
            figures[f"{name}_outputs"] = outputs
        return figures


def unstacked(params: Any) -> Iterator[Any]:
    """The weights of each run."""
    for i in range(jax.tree.leaves(params)[0].shape[0]):
        yield jax.tree.map(lambda x, i=i: x[i], params)


def measure() -> None:
    """Trains, evaluates and writes the file."""
    config, seeds, data = CONFIG.value, [int(seed) for seed in SEEDS.value], Path(DATA.value)
    began = time.perf_counter()
    model, params = train(config, data, seeds, average=AVERAGE.value)
    trained = time.perf_counter() - began
    if WEIGHTS.value is not None:
        save(Path(WEIGHTS.value), params)
    evaluate = Evaluation(
        config,
        data,
        model,
        splits=SPLITS.value,
        translated=TRANSLATED.value,
        beam_size=BEAMS.value,
    )
    results = [
        dict(run=i, split=split) | figures
        for i, weights in enumerate(unstacked(params))
        for split, figures in evaluate(weights).items()
    ]
    about = dict(
        name=Path(OUTPUT.value).stem,
        seeds=seeds,
        parameters=sum(x.size for x in jax.tree.leaves(nnx.state(model))),
        average=AVERAGE.value,
        beam_size=BEAMS.value,
        train_seconds=round(trained),
        seconds=round(time.perf_counter() - began),
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        config=json.loads(config.to_json()),
        references={
            split: read_lines(data / f"{split}.{config.data.target}.txt") for split in SPLITS.value
        },
    )
    Path(OUTPUT.value).write_text(json.dumps(dict(about=about, results=results)))


def shown(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    digits = 2 if statistics.fmean(values) > 10 else 3
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def compare(files: Sequence[str]) -> None:
    """Prints the tables."""
    runs = [json.loads(Path(file).read_text()) for file in files]
    names = [run["about"]["name"] for run in runs]
    for split, reference in runs[0]["about"]["references"].items():
        by_run = [[r for r in run["results"] if r["split"] == split] for run in runs]
        figures = [name for name in by_run[0][0] if name.startswith("ln_") or "bleu" in name]
        print(f"\n{split}, seeds {runs[0]['about']['seeds']}\n")
        print(f"| | {' | '.join(figures)} |")
        print("|---" * (len(figures) + 1) + "|")
        for name, results in zip(names, by_run, strict=True):
            cells = [shown([r[figure] for r in results]) for figure in figures]
            print(f"| {name} | {' | '.join(cells)} |")
        print(f"\nln_perplexity_word, difference to {names[0]}, t-test of pairs of a seed")
        for name, results in list(zip(names, by_run, strict=True))[1:]:
            ours, theirs = ([r["ln_perplexity_word"] for r in rs] for rs in (results, by_run[0]))
            gap = statistics.fmean(ours) - statistics.fmean(theirs)
            print(f"  {name:24} {gap:+.4f}  p = {stats.ttest_rel(ours, theirs).pvalue:.4f}")
        for search in ("greedy", "beam"):
            if f"{search}_outputs" in by_run[0][0]:
                compare_texts(search, names, by_run, reference)


def compare_texts(search: str, names: list[str], by_run: list, reference: list[str]) -> None:
    """Prints by how much BLEU differs, and whether that is by chance."""
    systems = [
        (name, [text for result in results for text in result[f"{search}_outputs"]])
        for name, results in zip(names, by_run, strict=True)
    ]
    metric = sacrebleu.BLEU(lowercase=True, references=[reference * len(by_run[0])])
    test = PairedTest(systems, {"BLEU": metric}, references=None, test_type="bs", n_samples=1000)
    scores = test()[1]["BLEU"]
    print(f"\n{search}, BLEU lowercased, difference to {names[0]}, paired bootstrap")
    for name, score in list(zip(names, scores, strict=True))[1:]:
        print(f"  {name:24} {score.score - scores[0].score:+.2f}  p = {score.p_value:.4f}")


def main(args: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if args[1:]:
        compare(args[1:])
    elif None in (CONFIG.value, DATA.value, OUTPUT.value):
        raise app.UsageError("give --config, --data and --output, or files to compare")
    else:
        measure()


if __name__ == "__main__":
    app.run(main)
