"""The training loop."""

import contextlib
import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mqa_jax.core.lock import locked
from mqa_jax.core.paths import local_path
from mqa_jax.core.sharding import make_mesh
from mqa_jax.data import loader
from mqa_jax.data.manifest import Manifest
from mqa_jax.data.prepare import prepare
from mqa_jax.train import workdir as workdirs
from mqa_jax.train.checkpoint import Checkpoints
from mqa_jax.train.config import check_config, remarks
from mqa_jax.train.evaluate import make_evaluate
from mqa_jax.train.meter import Meter, NoLog
from mqa_jax.train.metrics import MetricLog
from mqa_jax.train.processes import Stop, first_process_first, put_batch, row_share
from mqa_jax.train.progress import Best, lacks_evaluation
from mqa_jax.train.setup import diagnosis, set_up, step_flops
from mqa_jax.train.start import find_start
from mqa_jax.train.teacher import find_teacher

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later.


def train(config: ConfigDict, workdir: str) -> int:
    """Returns the exit code."""
    path = local_path("--workdir", workdir)
    with contextlib.ExitStack() as stack:
        return _train(config, path, stack)


def _train(config: ConfigDict, path: Path, stack: contextlib.ExitStack) -> int:
    begin = find_start(config, path)
    config = begin.config
    check_config(config)
    mesh = make_mesh(**config.mesh)
    check_config(config, mesh.shape)
    if jax.process_index() == 0:
        stack.enter_context(locked(path, "training"))
    # Here, as processes read it together.
    teacher = find_teacher(config, mesh)
    with first_process_first():
        workdirs.check(path, workdirs.describe(config))
        data = prepare(config.data, begin.tokenizer)
        tokenizer = workdirs.load_row_tokenizer(data)
        manifest = Manifest.read(data)
        if teacher is not None:
            teacher.check_tokenizer(tokenizer.ids_sha256)
        about = workdirs.describe(config, manifest, teacher and teacher.sha256)
        workdirs.check(path, about)

    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{data} has ids up to {tokenizer.vocab_size - 1}, the model vectors for "
            f"{config.model.vocab_size}: raise --config.model.vocab_size"
        )

    settings = config.train
    checkpoints = stack.enter_context(
        Checkpoints(path / workdirs.CHECKPOINTS, keep=settings.keep_checkpoints, run=about)
    )
    is_resumed, ids = checkpoints.latest_step() is not None, tokenizer.ids
    params = None if is_resumed else begin.params
    structure, teacher_params = (None, None) if teacher is None else teacher[:2]
    model, state, train_step, schedule = set_up(
        config, mesh, ids=ids, params=params, teacher=structure
    )
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    if is_resumed:
        workdirs.check_signed(path, checkpoints.run(), about)
        state = checkpoints.restore(state)
    elif begin.continued is not None:
        state = begin.continued(state)
    start = int(state.step)
    evaluate = make_evaluate(config, model, tokenizer, data, mesh, manifest)

    log = MetricLog(path, settings.steps, start) if jax.process_index() == 0 else NoLog()
    log.print(
        f"{parameters:,} parameters, {mesh.size} {mesh.devices.flat[0].platform} device(s), "
        f"step {start:,} to {settings.steps:,}"
    )
    if not is_resumed and config.get("init_from"):
        moments = " and the optimizer" * (begin.continued is not None)
        log.print(f"begins with the weights{moments} of {config.init_from}")
    if teacher is not None:
        log.print(f"learns from {config.train.teacher} too")
    for remark in remarks(config):
        log.print(remark)
    index, count = row_share(mesh, settings.batch_size)
    batches = loader.train_batches(
        data,
        batch_size=settings.batch_size,
        seed=settings.seed,
        start=start,
        manifest=manifest,
        process_index=index,
        process_count=count,
    )
    flops = step_flops(config, model, structure)
    diagnose = diagnosis(config, model, mesh, ids, structure)
    meter = Meter(log, 1e-12 * flops / mesh.size, lambda *found: diagnose(*found, teacher_params))
    # Were all steps of a run skipped, it would end well with weights that have learnt nothing.
    most_skipped = min(settings.max_skipped_steps, settings.steps)

    stop, step, is_stopped, validation = Stop(), start, False, {"loss": 0.0}
    if lacks_evaluation(path, config, start):
        validation = evaluate(state.params, log.print)
        log.write("validation", start, validation)
        meter.restart()
    best = Best(path, config)
    is_over = best.look(start)
    if is_over or start >= settings.steps:
        log.print(f"nothing is left to train: decode with mqa-jax decode --workdir={path}")
    # The metrics of a step are fetched a step late, so that the device never waits for the host:
    # but at once where something hangs on whether the step was skipped.
    waiting = None
    while step < settings.steps and not is_stopped and not is_over:
        batch = put_batch(mesh, next(batches))
        state, metrics = train_step(state, batch, teacher_params)
        if step == start and jax.process_index() == 0:
            # What was prepared, built and compiled is possible: from here on it is this run's.
            jax.block_until_ready(metrics)
            for change in workdirs.claim(path, about, data):
                log.print(f"changed since the last start: {change}")
        step += 1
        if waiting:
            meter.add(*waiting, state.params)
        waiting = step, metrics, batch
        is_last, is_stopped = step == settings.steps, stop(step)
        is_logged = step % settings.log_every == 0 or is_last or is_stopped
        is_saved = step % settings.checkpoint_every == 0 or is_last or is_stopped
        if is_logged or is_saved or meter.skipped_in_a_row + 1 >= most_skipped:
            meter.add(*waiting, state.params)
            waiting = None
        if is_logged:
            # What the step was done with: the schedule follows the step, skipped ones or not.
            log.write("train", step, meter.read() | {"learning_rate": schedule(step - 1)})
            checkpoints.check()
        skipped = meter.skipped_in_a_row
        is_hopeless = skipped >= most_skipped
        if is_saved or is_hopeless:
            # From before the skipped steps, so that a resumed run comes to the same end.
            position = step if is_last and not is_hopeless else step - skipped
            checkpoints.save(dataclasses.replace(state, step=jnp.int32(position)), best.steps)
        if is_hopeless:
            checkpoints.close()
            raise RuntimeError(
                f"the loss or the gradient of {skipped} steps in a row, {position + 1} to {step}, "
                f"was not finite; of the last: {meter.cause}. The checkpoint of step {position}, "
                "before them, is saved: look at the data, or start anew in another --workdir, with "
                "a lower learning rate"
            )
        if (step % settings.evaluate_every == 0 and not is_stopped) or is_last:
            validation = evaluate(state.params, log.print)
            log.write("validation", step, validation)
            meter.restart()
            is_over = best.look(step)
        if is_over:  # The last step after all, under its own number though it was skipped.
            checkpoints.save(dataclasses.replace(state, step=jnp.int32(step)), best.steps)
    checkpoints.close()
    if is_over:
        log.print(f"ends at step {step:,}: {best}")
    is_done = is_over or step >= settings.steps
    if is_done and not math.isfinite(validation["loss"]):
        raise RuntimeError(
            f"the validation loss of the last step, {step}, is {validation['loss']}: the weights "
            "are of no use; the checkpoint is saved"
        )
    if not is_done:
        log.print(f"stopped by a signal; the checkpoint of step {position:,} is saved")
    log.close()
    return 0 if is_done else STOPPED
