"""The learning-rate schedule and the optimizers, by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from stepping import SIZES, begin, close, lenient, put, random_batch

from mqa_jax.model.transformer import build_model
from mqa_jax.train.optimizer import OPTIMIZERS, build_optimizer, rsqrt_schedule
from mqa_jax.train.step import make_train_step

PAPER = (1.0, 100_000, 10_000, 0, 20_000)

RAMPED = (2.0, 50, 16, 8, 10)


@pytest.mark.parametrize(
    "arguments, step, expected",
    [
        (PAPER, 0, 0.01),
        (PAPER, 10_000, 0.01),
        (PAPER, 40_000, 0.005),
        (PAPER, 80_000, 80_000**-0.5),
        (PAPER, 90_000, 1 / 600),
        (PAPER, 99_999, 99_999**-0.5 / 20_000),
        (PAPER, 100_000, 0),
        (PAPER, 100_001, 0),
        (RAMPED, 0, 0.0625),
        (RAMPED, 6, 0.4375),
        (RAMPED, 7, 0.5),
        (RAMPED, 16, 0.5),
        (RAMPED, 25, 0.4),
        (RAMPED, 45, 45**-0.5),
        ((3.0, 50, 0, 0, 0), 0, 3.0),
        ((3.0, 50, 0, 0, 0), 100, 0.3),
    ],
)
def test_rsqrt_schedule(arguments, step, expected):
    learning_rate, total_steps, hold, warmup, decay = arguments
    schedule = rsqrt_schedule(
        learning_rate, total_steps, hold_steps=hold, warmup_steps=warmup, decay_steps=decay
    )
    # The last steps of the decay are differences of float32 values of 1e5.
    for rate in (schedule(step), jax.jit(schedule)(jnp.int32(step))):
        np.testing.assert_allclose(rate, expected, rtol=1e-6)


def test_what_cannot_be_built():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=r"task='poetry' .*language_model.*translation"):
        build_model("poetry", SIZES, rngs=rngs)
    with pytest.raises(ValueError, match=r"unknown fields \['a_b', 'z'\]; known .*vocab_size"):
        build_model("translation", SIZES | dict(z=1, a_b=2), rngs=rngs)
    with pytest.raises(ValueError, match=r"d_ff must be at least 1, not 0"):
        build_model("language_model", SIZES | dict(d_ff=0), rngs=rngs)
    with pytest.raises(ValueError, match=r"optimizer 'sgd' .*adafactor.*adamw"):
        build_optimizer("sgd", 0.1)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(learning_rate=math.inf),
            "learning_rate must be a finite number, at least 0, not inf",
        ),
        (dict(learning_rate=-1.0), "learning_rate must be .* not -1.0"),
        (dict(total_steps=0), "total_steps must be at least 1, not 0"),
        (dict(hold_steps=-1), "hold_steps must be at least 0, not -1"),
        (dict(warmup_steps=0.5), "warmup_steps must be an integer, not 0.5"),
        (dict(decay_steps=-3), "decay_steps must be at least 0, not -3"),
    ],
)
def test_a_schedule_that_makes_no_sense(change, message):
    arguments = dict(learning_rate=1.0, total_steps=9, hold_steps=1, warmup_steps=0, decay_steps=0)
    with pytest.raises(ValueError, match=message):
        rsqrt_schedule(**arguments | change)


def test_an_optimizer_that_makes_no_sense():
    with pytest.raises(ValueError, match="weight_decay must be .* not nan"):
        build_optimizer("adafactor", lambda _: 0.1, weight_decay=math.nan)
    with pytest.raises(ValueError, match="learning_rate must be .* not inf"):
        build_optimizer("adamw", math.inf)


WEIGHTS = {
    "attention": {"query": jnp.full((2, 3, 5), 2.0), "query_bias": jnp.full((2, 3), 2.0)},
    "embedder": {"positions": {"table": jnp.full((7, 5), 2.0)}},
    "norm": {"scale": jnp.full(5, 2.0)},
}


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_times_the_rate_and_not_of_norms_and_positions(name, rate):
    """Without gradients, what is left is the decay."""
    optimizer = lenient(build_optimizer(name, lambda _: rate, weight_decay=0.1))
    zeros = jax.tree.map(jnp.zeros_like, WEIGHTS)
    changes, _ = optimizer.update(zeros, optimizer.init(WEIGHTS), WEIGHTS)
    query = changes["attention"].pop("query")
    np.testing.assert_allclose(query, np.full((2, 3, 5), -rate * 0.1 * 2), rtol=1e-6)
    for other in jax.tree.leaves(changes):
        np.testing.assert_array_equal(other, np.zeros(other.shape))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_bfloat16_weights_are_float32(name):
    """In bfloat16 they would stand still at about half of what they should come to."""
    optimizer = lenient(build_optimizer(name, lambda _: 0.01))
    weights = {dtype: {"w": jnp.full((2, 3), 2, dtype)} for dtype in ("bfloat16", "float32")}
    moments = []
    for dtype, params in weights.items():
        state = optimizer.init(params)
        for i in range(60):
            gradient = {"w": jnp.full((2, 3), 0.5 if i % 2 else 1, dtype)}
            changes, state = optimizer.update(gradient, state, params)
        moments.append(state)
    assert {str(x.dtype) for x in jax.tree.leaves(moments[0])} == {"float32", "int32"}
    close(moments[0], moments[1], rtol=1e-6)


def test_the_state_has_the_paths_of_optax_s_own():
    """So that checkpoints of one and of the other can be read with either."""
    own = (
        optax.adafactor(lambda _: 0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda _: 0.1, weight_decay=0.1)),
    )
    for name, theirs in zip(OPTIMIZERS, own, strict=True):
        ours = build_optimizer(name, lambda _: 0.1, weight_decay=0.1)
        paths = [
            [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
            for state in (ours.init(WEIGHTS), theirs.init(WEIGHTS))
        ]
        assert paths[0] == paths[1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_skipped_steps_the_rate_is_that_of_the_step(name):
    """The decay then ends where the run does, and what a log says of a step is what it had."""
    task = "language_model"
    schedule = rsqrt_schedule(1.0, 6, hold_steps=1, warmup_steps=0, decay_steps=3)
    asked = []

    def spy(step):
        jax.debug.callback(lambda step: asked.append(int(step)), step, ordered=True)
        return schedule(step)

    optimizer = lenient(build_optimizer(name, spy))
    model, state = begin(task, optimizer)
    step, batch = make_train_step(model, optimizer, state, seed=0), put(random_batch())
    bad = batch | dict(target_tokens=batch["target_tokens"] + 99)
    skipped = []
    for i in range(6):
        state, metrics = step(state, bad if i in (1, 2) else batch)
        skipped.append(int(metrics["skipped"]))
    jax.effects_barrier()
    assert skipped == [0, 1, 1, 0, 0, 0] and asked == [0, 1, 2, 3, 4, 5]
