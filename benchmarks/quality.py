"""How good the variants of a config become: several runs of each, side by side in one program.

    python benchmarks/quality.py --config=configs/multi30k.py:multi_query --data=DIR --output=FILE
    python benchmarks/quality.py FILE [FILE ...]

The first trains the config once for each of `--seeds`, as train.py does with that
`--config.train.seed`: the same first weights, batches and dropout, to the rounding of sums. A small
model leaves a GPU idle, and several in one program cost it little more than one. `--data` is what
`mqa_jax.data.prepare` made. With `--average=N` the mean of the last N checkpoints
(`checkpoint_every` steps apart) is evaluated, and not the last weights.

The second prints tables of such files, as Markdown: means and standard deviations over seeds, and
each file against the first one. ln(perplexity): a t-test of the differences by seed. BLEU: paired
bootstrap by sacrebleu, over the outputs of all seeds, one behind the other.
"""

import functools
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sacrebleu
from absl import app, flags, logging
from flax import nnx
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
from mqa_jax.train.optimizer import build_optimizer
from mqa_jax.train.setup import schedule_of, step_options
from mqa_jax.train.state import TrainState, init_state
from mqa_jax.train.step import dropout_key, make_eval_step, make_update, mean_metrics
from mqa_jax.train.workdir import load_row_tokenizer

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py:VARIANT")
DATA = flags.DEFINE_string("data", None, "Prepared data of that config.")
OUTPUT = flags.DEFINE_string("output", None, "Where the figures go, as JSON.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Of a run each.")
AVERAGE = flags.DEFINE_integer("average", 1, "Checkpoints, the last ones.", lower_bound=1)
BEAMS = flags.DEFINE_integer("beam_size", 4, "Beside greedy.", lower_bound=2)
SPLITS = flags.DEFINE_list("splits", ["validation", "test"], "To evaluate.")
TRANSLATED = flags.DEFINE_list("translated", ["test"], "Those of which BLEU is told, too.")

CHUNK = 50  # Steps of one call.


def train(
    config: ConfigDict,
    data: Path,
    seeds: Sequence[int],
    params: Any = None,
    average: int = 1,
) -> tuple[Model, Any]:
    """The model's structure, and the weights of a run for each seed, stacked.

    Args:
      params: stacked weights to begin with; drawn by the seeds when None.
      average: of how many checkpoints, the last ones, the weights are the mean.
    """
    mesh = make_mesh(devices=jax.devices()[:1])
    settings = config.train
    build = functools.partial(build_model, config.task, config.model.to_dict())
    optimizer = build_optimizer(
        settings.optimizer, schedule_of(config), weight_decay=settings.weight_decay
    )
    ids = Manifest.read(data).ids
    states = [init_state(build, optimizer, mesh, seed) for seed in seeds]
    model = states[0][0]
    state = jax.tree.map(lambda *x: jnp.stack(x), *(state for _, state in states))
    if params is not None:
        state = TrainState(state.step, params, jax.vmap(optimizer.init)(params))
    update = make_update(model, optimizer, mesh, ids=ids, **step_options(config))

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        def one(state: TrainState, batch: Any, seed: Any) -> tuple[TrainState, Any]:
            state, metrics = update(state, batch, dropout_key(seed, state.step))
            return state, (metrics["loss"], metrics["skipped"])

        return jax.vmap(one)(state, batch, jnp.asarray(seeds, jnp.uint32))

    run = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches), donate_argnums=0)
    batches = [
        loader.train_batches(data, batch_size=settings.batch_size, seed=seed) for seed in seeds
    ]
    saved = {settings.steps - i * settings.checkpoint_every for i in range(average)}
    total: Any = None
    done, began = 0, time.perf_counter()
    while done < settings.steps:
        size = min([CHUNK, settings.steps - done, *(s - done for s in saved if s > done)])
        chunk = [[next(stream) for stream in batches] for _ in range(size)]
        stacked = {
            name: np.stack([[batch[name] for batch in row] for row in chunk])
            for name in chunk[0][0]
        }
        state, (losses, skipped) = run(state, stacked)
        done += size
        if np.any(skipped):
            raise ValueError(f"a step up to {done} was skipped: lower the learning rate")
        if done in saved:
            total = (
                jax.tree.map(jnp.copy, state.params)
                if total is None
                else jax.tree.map(jnp.add, total, state.params)
            )
        if done % 500 < size or done == settings.steps:
            loss = np.asarray(losses[-1])
            print(f"step {done} {time.perf_counter() - began:.0f} s, losses {loss}", flush=True)
    return model, jax.tree.map(lambda x: x / len(saved), total)


def evaluate(
    config: ConfigDict, data: Path, model: Model, params: Sequence[Any], splits: Sequence[str]
) -> list[dict[str, Any]]:
    """For each of `params` and splits the figures, with the texts behind them."""
    mesh = make_mesh(devices=jax.devices()[:1])
    tokenizer = load_row_tokenizer(data)
    eval_step = make_eval_step(model, mesh, ids=tokenizer.ids)
    searches: dict[str, Any] = {}
    if config.task == "translation":
        searches = {"greedy": greedy}
        searches["beam"] = functools.partial(beam_search, beam_size=BEAMS.value)
    vocab_size = model.config.vocab_size
    rules = only_text(tokenizer.vocab_size, vocab_size, (tokenizer.ids.eos,))
    found = []
    for split in splits:
        target = read_lines(data / f"{split}.{config.data.target}.txt")
        batches = list(loader.eval_batches(data, split, batch_size=config.evaluate.batch_size))
        decoders = {
            name: LineDecoder(
                model,
                tokenizer,
                search=functools.partial(search, eos_id=tokenizer.ids.eos, rules=rules),
                batch_size=len(target),
                bos_id=tokenizer.ids.bos or 0,
            )
            for name, search in searches.items()
            if split in TRANSLATED.value
        }
        for i, weights in enumerate(params):
            sums = add_up(jax.device_get([eval_step(weights, batch) for batch in batches]))
            figures = mean_metrics(sums)
            result = dict(
                split=split,
                run=i,
                ln_perplexity=float(figures["ln_perplexity"]),
                # A sentence's end counts as a word.
                ln_perplexity_word=float(
                    sums["nll"] / sum(len(line.split()) + 1 for line in target)
                ),
            )
            for name, decoder in decoders.items():
                source = read_lines(data / f"{split}.{config.data.source}.txt")
                outputs = list(decoder.texts(weights, source))
                result |= {
                    f"{name}_bleu": sacrebleu.corpus_bleu(outputs, [target]).score,
                    f"{name}_bleu_lowercased": sacrebleu.corpus_bleu(
                        outputs, [target], lowercase=True
                    ).score,
                    f"{name}_outputs": outputs,
                }
            found.append(result)
    return found


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
    results = evaluate(config, data, model, list(unstacked(params)), SPLITS.value)
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
    deviation = f" +- {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{deviation}"


def compare(files: Sequence[str]) -> None:
    """Prints the tables."""
    runs = [json.loads(Path(file).read_text()) for file in files]
    for split in runs[0]["about"]["references"]:
        by_run = [[r for r in run["results"] if r["split"] == split] for run in runs]
        names = [name for name in by_run[0][0] if name.startswith("ln_") or "bleu" in name]
        print(f"\n{split}, seeds {runs[0]['about']['seeds']}\n")
        print("| |", " | ".join(names), "|")
        print("|---" * (len(names) + 1) + "|")
        for run, results in zip(runs, by_run, strict=True):
            cells = [shown([r[name] for r in results]) for name in names]
            print(f"| {run['about']['name']} |", " | ".join(cells), "|")
        for name in ("ln_perplexity", "ln_perplexity_word"):
            print(f"\n{name}, difference to {runs[0]['about']['name']}, p by seed:")
            for run, results in zip(runs[1:], by_run[1:], strict=True):
                ours, theirs = ([r[name] for r in rs] for rs in (results, by_run[0]))
                test = stats.ttest_rel(ours, theirs)
                gap = statistics.fmean(ours) - statistics.fmean(theirs)
                print(f"  {run['about']['name']:24} {gap:+.4f}  p = {test.pvalue:.4f}")
        reference = runs[0]["about"]["references"][split]
        for search in ("greedy", "beam"):
            if f"{search}_outputs" not in by_run[0][0]:
                continue
            systems = [
                (
                    run["about"]["name"],
                    [text for result in results for text in result[f"{search}_outputs"]],
                )
                for run, results in zip(runs, by_run, strict=True)
            ]
            repeats = math.prod([len(by_run[0])])
            metric = sacrebleu.BLEU(lowercase=True, references=[reference * repeats])
            test = PairedTest(
                systems, {"BLEU": metric}, references=None, test_type="bs", n_samples=1000
            )
            _, scores = test()
            print(f"\n{search}, BLEU lowercased, difference to {systems[0][0]}, paired bootstrap:")
            for (name, _), score in list(zip(systems, scores["BLEU"], strict=True))[1:]:
                gap = score.score - scores["BLEU"][0].score
                print(f"  {name:24} {gap:+.2f}  p = {score.p_value:.4f}")


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
