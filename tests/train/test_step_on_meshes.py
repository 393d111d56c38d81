"""The train and eval steps on eight devices, which give what they give on one."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stepping import (
    ADAMW,
    GRADIENT_DESCENT,
    SIZES,
    begin,
    both_tasks,
    close,
    lenient,
    make_step,
    mesh_of,
    put,
    random_batch,
)

from mqa_jax.model.transformer import build_model
from mqa_jax.train.optimizer import build_optimizer
from mqa_jax.train.state import init_state
from mqa_jax.train.step import make_eval_step, make_train_step


@pytest.mark.slow
@both_tasks
def test_evaluation_is_split_as_training_is(task):
    sums = {}
    for sizes in ((1, 1, 1), (2, 2, 2)):
        model, state = begin(task, GRADIENT_DESCENT, sizes)
        eval_step, batch = make_eval_step(model, mesh_of(*sizes)), put(random_batch(), sizes)
        # Of the embeddings and each layer; what XLA would do without, one cannot tell.
        assert "sharding_constraint" in str(jax.make_jaxpr(eval_step)(state.params, batch))
        sums[sizes] = jax.device_get(eval_step(state.params, batch))
    close(sums[1, 1, 1], sums[2, 2, 2], rtol=1e-5)


@functools.cache
def three_steps(sizes):
    """Losses, gradient norms and weights of three steps; and how often XLA was asked to compile."""
    _, state = begin("translation", ADAMW, sizes)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    train_step = make_step("translation", ADAMW, sizes)
    batch, metrics, records = put(random_batch(), sizes), [], []
    logger, handler = logging.getLogger("jax"), logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    with jax.log_compiles():
        for _ in range(3):
            state, figures = train_step(state, batch)
            metrics.append([float(figures[name]) for name in ("loss", "gradient_norm", "tokens")])
    logger.removeHandler(handler)
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    compiled = [text for text in records if "ompil" in text and "train_step" in text]
    finished = [text for text in compiled if "Finished XLA compilation" in text]
    return metrics, jax.device_get(state.params), finished


@functools.cache
def loss_curve(task, sizes, r_drop=0.0, distillation=0.0, **changes):
    """The losses of 20 steps; a teacher, if there is one, has the weights of the start."""
    sizes_of_model = dict(SIZES, num_heads=8, vocab_size=24, d_model=16, d_ff=24) | changes
    build = functools.partial(build_model, task, sizes_of_model)
    optimizer = lenient(build_optimizer("adafactor", lambda _: 0.02))
    model, state = init_state(build, optimizer, mesh_of(*sizes), 3)
    options = dict(label_smoothing=0.1, r_drop=r_drop, distillation=distillation)
    teacher, wise = None, None
    if distillation:
        teacher, wise = model, jax.tree.map(jnp.copy, state.params)
    step = make_train_step(model, optimizer, state, seed=0, teacher=teacher, **options)
    batch, losses = put(random_batch(), sizes), []
    for _ in range(20):
        state, metrics = step(state, batch, wise)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "sizes", "options"),
    [
        ("translation", (1, 8, 1), dict(num_kv_heads=1)),
        ("translation", (1, 1, 8), dict(num_kv_heads=8, distillation=0.1)),
        ("language_model", (2, 2, 2), dict(num_kv_heads=8, dropout_rate=0.1, r_drop=1.0)),
    ],
)
def test_the_loss_curve_is_that_of_one_device(task, sizes, options):
    expected = loss_curve(task, (1, 1, 1), **options)
    assert expected[-1] < 0.8 * expected[0]
    actual = loss_curve(task, sizes, **options)
    # Sums in another order, which twenty updates carry along.
    np.testing.assert_allclose(actual, expected, rtol=2e-3)


@pytest.mark.slow
def test_activations_are_split_as_the_batch_is_and_not_as_the_weights():
    """Else XLA exchanges activations between a split of rows and one of the model dim."""
    sizes = (1, 8, 1)
    build = functools.partial(build_model, "translation", SIZES | dict(d_model=16, d_ff=24))
    model, state = init_state(build, ADAMW, mesh_of(*sizes), 3)
    step = make_train_step(model, ADAMW, state, seed=0)
    program = step.lower(state, put(random_batch(), sizes)).compile().as_text()
    exchanges = [line for line in program.splitlines() if " all-to-all(" in line]
    names = [re.search(r'op_name="([^"]*)"', line)[1] for line in exchanges]
    # But for the vectors of tokens, which are looked up in tables that are split.
    assert names and all(name.endswith(("/gather", "/scatter-add")) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_a_mesh_changes_nothing_but_the_place(sizes):
    expected_metrics, expected_params, _ = three_steps((1, 1, 1))
    metrics, params, compilations = three_steps(sizes)
    assert len(compilations) == 1, compilations
    # float32 sums over 40 tokens in another order; AdamW then divides small by small.
    np.testing.assert_allclose(metrics, expected_metrics, rtol=1e-4)
    close(params, expected_params, rtol=1e-3, atol=1e-3)
