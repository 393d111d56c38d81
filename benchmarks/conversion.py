"""What becomes of a multi-head model with fewer heads: by merge, and by how much it is uptrained.

    python benchmarks/conversion.py --config=configs/multi30k.py:multi_head --data=DIR \
      --num_kv_heads=1 --base=FILE.npz --output=FILE

Trains the config once, unless `--base` is there already, then merges the heads of the decoder's
two kinds of attention in each way there is, and trains each further with each of `--seeds` for each
of `--alphas`, a share of the config's steps. The rate begins where the config's stood before its
decay, times a factor, and falls to 0 in a straight line; the factor is the one of `--factors` that
is best on validation at `--tuned_at`, for all merges alike. A merge with "text" in its name is of
what heads make of the first training rows, and not of their weights.
"""

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
from ml_collections import ConfigDict

from mqa_jax.convert.calibrate import batches_of, input_moments
from mqa_jax.convert.heads import convert_heads
from mqa_jax.convert.merges import MERGES
from mqa_jax.data import loader
from mqa_jax.data.manifest import Manifest
from mqa_jax.model.transformer import Model, build_model
from mqa_jax.train.optimizer import rsqrt_schedule

BASE = flags.DEFINE_string("base", None, "Where the weights to convert are, or are put.")
HEADS = flags.DEFINE_integer("num_kv_heads", 1, "Of the decoder and of cross-attention.")
ALPHAS = flags.DEFINE_list("alphas", ["0.05", "0.1", "0.01", "0.2"], "Shares of the steps.")
FACTORS = flags.DEFINE_list(
    "factors", ["1", "0.5", "0.25"], "Of the learning rate, to choose from."
)
TUNED_AT = flags.DEFINE_float("tuned_at", 0.05, "The alpha at which it is chosen.")
CALIBRATION = flags.DEFINE_integer("calibration_rows", 96, "Of the training text.")


def base(config: ConfigDict, data: Path) -> Model:
    """The model to convert, with its weights."""
    structure = nnx.eval_shape(
        lambda: build_model(config.task, config.model.to_dict(), rngs=nnx.Rngs(0))
    )
    path = Path(BASE.value)
    if not path.exists():
        seed = config.train.seed
        _, stacked = quality.train(config, data, [seed], average=quality.AVERAGE.value)
        leaves = jax.tree.leaves(next(quality.unstacked(stacked)))
        np.savez(path, *map(np.asarray, leaves))
    with np.load(path) as file:
        leaves = [jnp.asarray(file[name]) for name in file.files]
    tree = jax.tree.structure(nnx.as_pure(nnx.state(structure)))
    return nnx.merge(nnx.graphdef(structure), jax.tree.unflatten(tree, leaves))


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
    evaluate = quality.Evaluation(
        config,
        data,
        structure,
        splits=["validation", "test"],
        translated=quality.TRANSLATED.value,
    )
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
        ),
        results=results,
    )

    def add(alpha: float, name: str, seed: int | None, params: Any) -> None:
        for split, figures in evaluate(params).items():
            kept = {key: x for key, x in figures.items() if not key.endswith("_outputs")}
            results.append(dict(alpha=alpha, merge=name, seed=seed, split=split) | kept)

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


def main(args: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    measure()


if __name__ == "__main__":
    app.run(main)
