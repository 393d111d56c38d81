"""Trains a model:

python train.py --config=configs/multi30k.py:multi_query --workdir=DIR [--config.train.steps=1000]

The same command again resumes the run where it stopped.

python train.py --config=configs/wmt14.py:multi_query --compile_only=v5e:4x4

only compiles, for a TPU that need not be here, and tells whether it fits, and what it moves.
"""

import functools
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict, config_flags

from mqa_jax import compile_only
from mqa_jax import workdir as workdirs
from mqa_jax.checkpoint import Checkpoints
from mqa_jax.data import loader
from mqa_jax.data.prepare import prepare
from mqa_jax.data.tokenizer import BOS_ID, EOS_ID, Tokenizer
from mqa_jax.decoding import greedy
from mqa_jax.generate import LineDecoder
from mqa_jax.metrics import MetricLog, bleu, exact_match
from mqa_jax.sharding import ShardingRules, make_mesh
from mqa_jax.training import make_eval_step, mean_metrics, set_up

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py:VARIANT")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; made if it is not there.")
COMPILE_ONLY = flags.DEFINE_string(
    "compile_only", None, "A TPU topology, such as v5e:4x4: compiles for it, tells, trains nothing."
)


def train(config: ConfigDict, workdir: str) -> None:
    path = workdirs.claim(workdir, config)
    data = prepare(config.data)
    tokenizer = Tokenizer.load(workdirs.keep_tokenizer(path, data / "tokenizer.model"))

    mesh = make_mesh(**config.mesh)
    settings = config.train
    model, state, train_step, schedule = set_up(config, mesh)
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    checkpoints = Checkpoints(path / workdirs.CHECKPOINTS, keep=settings.keep_checkpoints)
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state)
    start = int(state.step)
    evaluate = make_evaluate(config, model, tokenizer, data)
    put = functools.partial(put_batch, mesh)

    log = MetricLog(path, settings.steps, start)
    log.print(
        f"{parameters:,} parameters, {mesh.size} {jax.default_backend()} device(s), "
        f"step {start:,} to {settings.steps:,}"
    )
    batches = loader.train_batches(
        data, batch_size=settings.batch_size, seed=settings.seed, start=start
    )
    # The metrics of a step are fetched a step late, so that the device never waits for the host.
    waiting, meter = None, Meter()
    for step in range(start + 1, settings.steps + 1):
        state, metrics = train_step(state, put(next(batches)))
        if waiting:
            meter.add(waiting)
        waiting = metrics
        if step % settings.log_every == 0 or step == settings.steps:
            meter.add(waiting)
            waiting = None
            log.write("train", step, meter.read() | {"learning_rate": schedule(step - 1)})
        is_last = step == settings.steps
        if step % settings.checkpoint_every == 0 or is_last:
            checkpoints.save(state)
        if step % settings.evaluate_every == 0 or is_last:
            log.write("validation", step, evaluate(state.params, put, log.print))
            meter.restart()
    checkpoints.close()
    log.close()


class Meter:
    """Means of the train metrics, and tokens a second, since the last reading."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._started = time.perf_counter()
        self._seen = []

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        self._seen.append(jax.device_get(metrics))

    def read(self) -> dict[str, float]:
        seen = {name: [metrics[name] for metrics in self._seen] for name in self._seen[0]}
        tokens = sum(seen.pop("tokens"))
        means = {name: float(np.mean(values)) for name, values in seen.items()}
        means["tokens_per_second"] = tokens / (time.perf_counter() - self._started)
        self.restart()
        return means


def put_batch(mesh: jax.sharding.Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch as its part of the global arrays."""
    sharding = NamedSharding(mesh, PartitionSpec(ShardingRules().B))
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def make_evaluate(config: ConfigDict, model: nnx.Module, tokenizer: Tokenizer, data: Path):
    """A function of parameters to the figures of the validation split."""
    eval_step = make_eval_step(model)
    settings = config.evaluate
    sources = references = []
    if config.task == "translation" and settings.lines:
        sources, references = (
            loader.read_lines(data / f"validation.{side}.txt")[: settings.lines]
            for side in (config.data.source, config.data.target)
        )
    decoder = LineDecoder(
        model,
        tokenizer,
        search=functools.partial(greedy, eos_id=EOS_ID),
        batch_size=settings.batch_size,
        bos_id=BOS_ID,
    )

    def evaluate(params: nnx.State, put, print_line) -> dict[str, float]:
        sums = None
        for batch in loader.eval_batches(data, "validation", batch_size=settings.batch_size):
            batch_sums = eval_step(params, put(batch))
            sums = batch_sums if sums is None else jax.tree.map(jnp.add, sums, batch_sums)
        figures = dict(jax.device_get(mean_metrics(sums)))
        if sources:
            hypotheses = [""] * len(sources)
            for i, decoded in decoder(params, sources):
                hypotheses[i] = tokenizer.decode(decoded.tokens[: decoded.length].tolist())
            figures["bleu"], signature = bleu(hypotheses, references)
            figures["exact_match"] = exact_match(hypotheses, references)
            print_line(f"  {sources[0]}  ->  {hypotheses[0]}  (reference: {references[0]})")
            print_line(f"  BLEU signature {signature}")
        return figures

    return evaluate


def main(_) -> int | None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file that it writes.
    if COMPILE_ONLY.value:
        return compile_only.train(CONFIG.value, COMPILE_ONLY.value)
    if WORKDIR.value is None:
        raise app.UsageError("give --workdir to train, or --compile_only")
    train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
