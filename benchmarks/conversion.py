"""What becomes of a multi-head model with fewer heads: by merge, and by how much it is uptrained.

    python benchmarks/conversion.py --config=configs/multi30k.py:multi_head --data=DIR \
      --num_kv_heads=1 --base=FILE.npz --output=FILE
    python benchmarks/conversion.py --picture=FILE --scratch=1.532+-0.022 FILE [FILE ...]

The first trains the config once, unless `--base` is there already, then merges the heads of the
decoder's two kinds of attention in each way there is, and trains each further with each of
`--seeds` for each of `--alphas`, a share of the config's steps. The rate begins where the config's
stood before its decay, times a factor, and falls to 0 in a straight line; the factor is the one of
`--factors` that is best on validation at `--tuned_at`, for all merges alike. A merge with "text" in
its name is of what heads make of the first training rows, and not of their weights.

The second prints tables of such files, as Markdown, and draws them side by side: ln(perplexity) of
validation data against alpha, a line a merge, beside the band of models that are trained from
scratch with as many heads, a `--scratch` for each file.
"""

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import quality
from absl import app, flags, logging
from flax import nnx
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from mqa_jax.convert.calibrate import batches_of, input_moments
from mqa_jax.convert.heads import convert_heads
from mqa_jax.convert.merges import MERGES
from mqa_jax.data import loader
from mqa_jax.data.manifest import Manifest
from mqa_jax.measure import plots
from mqa_jax.model.transformer import Model
from mqa_jax.train.optimizer import rsqrt_schedule

BASE = flags.DEFINE_string("base", None, "Where the weights to convert are, or are put.")
HEADS = flags.DEFINE_integer("num_kv_heads", 1, "Of the decoder and of cross-attention.")
ALPHAS = flags.DEFINE_list("alphas", ["0.05", "0.1", "0.01", "0.2"], "Shares of the steps.")
FACTORS = flags.DEFINE_list(
    "factors", ["1", "0.5", "0.25"], "Of the learning rate, to choose from."
)
TUNED_AT = flags.DEFINE_float("tuned_at", 0.05, "The alpha at which it is chosen.")
CALIBRATION = flags.DEFINE_integer("calibration_rows", 96, "Of the training text.")
PICTURE = flags.DEFINE_string("picture", None, "Where the picture of files goes, as PNG.")
SCRATCH = flags.DEFINE_list("scratch", [], "Of each file: the band's mean and width, 1.53+-0.02.")

SHOWN = [  # The columns of a table: a split's figure.
    ("validation", "ln_perplexity"),
    ("test", "ln_perplexity"),
    ("test", "greedy_bleu_lowercased"),
]
COLORS = dict(
    mean=plots.BLUE,
    first=plots.GRAY,
    random=plots.ORANGE,
    aligned=plots.GREEN,
    truncated=plots.VERMILION,
)


def base(config: ConfigDict, data: Path) -> Model:
    """The model to convert, with its weights."""
    structure, path = quality.abstract(config), Path(BASE.value)
    if not path.exists():
        seed = config.train.seed
        _, stacked = quality.train(config, data, [seed], average=quality.AVERAGE.value)
        quality.save(path, next(quality.unstacked(stacked)))
    return nnx.merge(nnx.graphdef(structure), quality.load(path, structure))


def moments_of(model: Model, data: Path) -> dict[str, np.ndarray]:
    """Of the first training rows, sentence by sentence."""
    ids = Manifest.read(data).ids
    batch = next(loader.train_batches(data, batch_size=CALIBRATION.value, seed=0))

    def sentences(name: str) -> list[list[int]]:
        found: list[list[int]] = []
        for row in batch[name]:
            ends = np.flatnonzero(row == ids.eos) + 1
            found += [part.tolist() for part in np.split(row, ends)[:-1]]
        return found

    prompts, answers = sentences("source_tokens"), sentences("target_tokens")
    batches = batches_of(model, prompts, answers, bos_id=ids.bos or 0, batch_size=128)
    return input_moments(model, batches)


def measure() -> None:
    """Writes the file anew behind each alpha."""
    config, data = quality.CONFIG.value, Path(quality.DATA.value)
    seeds = [int(seed) for seed in quality.SEEDS.value]
    wide = base(config, data)
    if quality.OUTPUT.value is None:
        return
    moments = moments_of(wide, data)
    converted: dict[str, Model] = {}
    for name, make in MERGES.items():
        converted[name] = convert_heads(wide, HEADS.value, merge=make())
        if name in ("aligned", "truncated"):
            converted[f"{name}, text"] = convert_heads(
                wide, HEADS.value, merge=make(), moments=moments
            )
    names = list(converted)
    states = [nnx.as_pure(nnx.state(model)) for model in converted.values()]
    narrow = next(iter(converted.values()))
    structure = nnx.eval_shape(lambda: nnx.clone(narrow))
    splits = ["validation", "test"]

    def evaluation(structure: Model) -> quality.Evaluation:
        translated = quality.TRANSLATED.value
        return quality.Evaluation(config, data, structure, splits=splits, translated=translated)

    def numbers(figures: dict[str, Any]) -> dict[str, float]:
        return {name: x for name, x in figures.items() if not name.endswith("_outputs")}

    evaluate = evaluation(structure)
    train = quality.Training(config, data, structure)
    settings = config.train

    def schedule(steps: int) -> Any:
        return rsqrt_schedule(
            settings.learning_rate,
            steps,
            # As it stood before its decay.
            hold_steps=max(settings.hold_steps, settings.steps - settings.decay_steps),
            warmup_steps=0,
            decay_steps=steps,
        )

    results = []
    record: dict[str, Any] = dict(
        about=dict(
            name=Path(quality.OUTPUT.value).stem,
            num_kv_heads=HEADS.value,
            seeds=seeds,
            device=jax.devices()[0].device_kind,
            jax=jax.__version__,
            config=json.loads(config.to_json()),
            base={
                split: numbers(figures)
                for split, figures in evaluation(quality.abstract(config))(
                    nnx.as_pure(nnx.state(wide))
                ).items()
            },
        ),
        results=results,
    )

    def add(alpha: float, name: str, seed: int | None, params: Any) -> None:
        for split, figures in evaluate(params).items():
            found = dict(alpha=alpha, merge=name, seed=seed, split=split)
            results.append(found | numbers(figures))

    for name, state in zip(names, states, strict=True):
        add(0.0, name, None, state)
        print(f"{name}: {results[-1]['ln_perplexity']:.3f} before any training", flush=True)
    factors = [float(x) for x in FACTORS.value]
    if len(factors) != len(seeds):  # Then all are one program.
        raise app.UsageError(f"give as many --factors as --seeds: {len(seeds)}")

    def uptrained(state: Any, alpha: float, seeds: list[int], factors: list[float]) -> list[Any]:
        steps = round(alpha * settings.steps)
        params = jax.tree.map(lambda x: jnp.stack([x] * len(seeds)), state)
        options: dict[str, Any] = dict(steps=steps, schedule=schedule(steps), factors=factors)
        return list(quality.unstacked(train(params, seeds, **options)))

    check = quality.Evaluation(config, data, structure, splits=["validation"])
    losses: dict[str, list[float]] = {}
    for name, state in zip(names, states, strict=True):
        tried = uptrained(state, TUNED_AT.value, [seeds[0]] * len(factors), factors)
        losses[name] = [check(params)["validation"]["ln_perplexity"] for params in tried]
    means = [statistics.fmean(by_factor) for by_factor in zip(*losses.values(), strict=True)]
    factor = factors[int(np.argmin(means))]
    record["about"] |= dict(factors=factors, tuned=losses, factor=factor)
    print(f"ln(perplexity) by factor {factors}: {losses}; taken: {factor}", flush=True)
    for alpha in map(float, ALPHAS.value):
        for name, state in zip(names, states, strict=True):
            trained = uptrained(state, alpha, seeds, [factor] * len(seeds))
            for seed, params in zip(seeds, trained, strict=True):
                add(alpha, name, seed, params)
        Path(quality.OUTPUT.value).write_text(json.dumps(record))


def report(files: list[str]) -> None:
    """Prints the tables, and draws them."""
    runs = [json.loads(Path(file).read_text()) for file in files]
    for run in runs:
        heads, results = run["about"]["num_kv_heads"], run["results"]
        alphas = sorted({r["alpha"] for r in results})
        for split, figure in SHOWN:
            had = run["about"]["base"][split][figure]
            print(f"\n{figure} of {split}, {heads} key/value head{'s' * (heads > 1)}, by alpha")
            print(f"before the conversion: {quality.shown([had])}\n")
            print(f"| | {' | '.join(f'{alpha:g}' for alpha in alphas)} |")
            print("|---" * (len(alphas) + 1) + "|")
            for merge, by_alpha in values(run, split, figure).items():
                cells = [quality.shown(by_alpha[alpha]) for alpha in alphas]
                print(f"| {merge} | {' | '.join(cells)} |")
    if PICTURE.value is not None:
        draw(runs, SCRATCH.value).savefig(PICTURE.value, dpi=150)


def values(run: dict[str, Any], split: str, figure: str) -> dict[str, dict[float, list[float]]]:
    """Of each merge, by alpha, those of the seeds."""
    found: dict[str, dict[float, list[float]]] = {}
    for result in run["results"]:
        if result["split"] == split:
            by_alpha = found.setdefault(result["merge"], {})
            by_alpha.setdefault(result["alpha"], []).append(result[figure])
    return found


def draw(runs: list[dict[str, Any]], scratch: list[str]) -> Figure:
    """A panel a file."""
    figure = Figure(figsize=(5 * len(runs), 4.5), layout="constrained")
    all_axes = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, run, band in itertools.zip_longest(all_axes, runs, scratch):
        heads = run["about"]["num_kv_heads"]
        for merge, by_alpha in values(run, "validation", "ln_perplexity").items():
            alphas = sorted(by_alpha)
            of, _, with_text = merge.partition(", ")
            axes.errorbar(
                range(len(alphas)),
                [statistics.fmean(by_alpha[alpha]) for alpha in alphas],
                [statistics.pstdev(by_alpha[alpha]) for alpha in alphas],
                label=merge,
                color=COLORS[of],
                marker="o",
                markersize=5,
                markerfacecolor="white" if with_text else COLORS[of],
                linestyle="--" if with_text else "-",
                capsize=2,
            )
        if band is not None:
            mean, width = map(float, band.split("+-"))
            label = f"trained from scratch\n{mean:g} +- {width:g}"
            axes.axhspan(mean - width, mean + width, color=plots.PURPLE, alpha=0.3, label=label)
        had = run["about"]["base"]["validation"]["ln_perplexity"]
        axes.axhline(had, color=plots.BLACK, linestyle=":", label="before the conversion")
        axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        axes.set(
            xlabel="alpha, the share of the steps",
            title=f"{heads} key/value head{'s' * (heads > 1)}",
        )
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    # What is far above is in the table: the differences between good ones are small.
    all_axes[0].set(ylim=(1.5, 1.72), ylabel="ln(perplexity) of validation data")
    all_axes[-1].legend(frameon=False, fontsize=9)
    return figure


def main(args: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if args[1:]:
        report(args[1:])
    elif None in (quality.CONFIG.value, quality.DATA.value, BASE.value):
        raise app.UsageError("give --config, --data and --base, or files to report")
    else:
        measure()


if __name__ == "__main__":
    app.run(main)
