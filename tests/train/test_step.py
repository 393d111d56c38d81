"""The train and eval steps on one device.

B batch   S source length   T target length   V vocabulary
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from stepping import (
    ADAFACTOR,
    ADAMW,
    GRADIENT_DESCENT,
    SIZES,
    begin,
    both_tasks,
    close,
    initial,
    make_batch,
    make_step,
    mesh_of,
    put,
    random_batch,
    sentences,
)

from mqa_jax.core import devices
from mqa_jax.data import BOS_ID
from mqa_jax.model.transformer import build_model
from mqa_jax.train.loss import apply, mean_metrics, token_losses
from mqa_jax.train.step import make_eval_step, make_gradients, make_train_step


def sums_alone(task, model, params, pairs, label_smoothing, z_loss):
    """`make_eval_step`'s sums, from each sentence alone: no packing, padding, or segment ids.

    And the loss with the options of training.
    """

    @jax.jit
    def logits_of(params, source_S, inputs_T):
        merged = nnx.merge(nnx.graphdef(model), params)
        sides = (inputs_T,) if task == "language_model" else (source_S, inputs_T)
        return merged(*(x[None] for x in sides))[0]

    nlls, losses, right = [], [], 0
    for source, target in pairs:
        logits = np.asarray(logits_of(params, source, np.array([BOS_ID, *target[:-1]])), np.float64)
        log_z = np.log(np.sum(np.exp(logits), axis=-1))
        nll = log_z - logits[np.arange(len(target)), target]
        smooth = (1 - label_smoothing) * nll + label_smoothing * (log_z - np.mean(logits, axis=-1))
        nlls.extend(nll)
        losses.extend(smooth + z_loss * log_z**2)
        right += np.sum(np.argmax(logits, axis=-1) == target)
    sums = dict(loss=sum(nlls), nll=sum(nlls), right=right, tokens=len(nlls))
    return sums, sum(losses)


@pytest.mark.slow
@both_tasks
def test_packing_and_padding_change_nothing(task):
    """The same four sentences: packed into two rows; a row each; and a batch without any."""
    options, size = dict(label_smoothing=0.1, z_loss=1e-2), (6, 9, 14)
    pairs = sentences((3, 4), (2, 5), (3, 4), (2, 5))
    packed = [[pairs[2], pairs[0], pairs[3]], [pairs[1]], [], [], [], []]
    unpacked = [[], *([pair] for pair in pairs), []]
    model, state = begin(task, GRADIENT_DESCENT)
    train_step = make_train_step(model, GRADIENT_DESCENT, state, seed=0, **options)
    sums, loss = sums_alone(task, model, state.params, pairs, **options)
    expected = mean_metrics(sums | dict(loss=loss))
    eval_step, before, after = make_eval_step(model, mesh_of(1, 1, 1)), state.params, []
    for rows in (packed, unpacked, [[]] * 6):
        batch = put(make_batch(rows, *size[1:]))
        actual_sums = eval_step(before, batch)
        _, state = begin(task, GRADIENT_DESCENT)
        state, metrics = train_step(state, batch)
        after.append((state.params, metrics.pop("gradient_norm")))
        assert float(metrics.pop("skipped")) == 0
        if any(rows):
            close(actual_sums, sums, rtol=1e-5)
            close(metrics, expected, rtol=1e-5)
    # Gradients of up to a few units, summed in another order.
    close(after[0], after[1], rtol=1e-4, atol=1e-5)
    squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), after[0][0], before)
    np.testing.assert_allclose(after[0][1], np.sqrt(sum(jax.tree.leaves(squares))), rtol=1e-4)
    # Without tokens: zeros, not NaN.
    assert set(map(float, (*actual_sums.values(), *metrics.values(), after[2][1]))) == {0.0}
    close(after[2][0], before, rtol=0)


@pytest.mark.parametrize(
    "task, optimizer",
    [
        pytest.param("translation", ADAMW, marks=pytest.mark.slow),
        ("language_model", ADAFACTOR),
    ],
)
def test_training_learns_a_batch_by_heart(task, optimizer):
    _, state = begin(task, optimizer)
    train_step, batch = make_step(task, optimizer), put(random_batch())
    losses = []
    for step in range(40):
        donated = state
        state, metrics = train_step(state, batch)
        assert int(state.step) == step + 1
        assert all(x.is_deleted() for x in jax.tree.leaves(donated.params))
        losses.append(float(metrics["ln_perplexity"]))
    assert losses[0] > 2.5 and losses[-1] < 0.5 * losses[0]
    assert np.isfinite(losses).all()


@both_tasks
def test_r_drop_is_two_readings_and_what_they_disagree_about(task):
    """Half of Liang et al. 2021, equation 4, from the logits of both, in float64."""
    model, state = begin(task, GRADIENT_DESCENT, dropout_rate=0.3)
    model = nnx.merge(nnx.graphdef(model), state.params)
    batch = make_batch([[pair] for pair in sentences((3, 4), (2, 5), (3, 4))], 7, 5)
    key, targets_BT = jax.random.key(3), batch["target_tokens"]
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), batch)
    both = jax.jit(lambda model, twice: apply(model, twice, nnx.Rngs(dropout=key)))
    logits = np.asarray(both(model, twice), np.float64)
    log_p = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    first, second = log_p[::2], log_p[1::2]
    nll_BT = -np.take_along_axis((first + second) / 2, targets_BT[..., None], axis=-1)[..., 0]
    divergences_BT = sum(
        np.sum(np.exp(p) * (p - q), axis=-1) for p, q in ((first, second), (second, first))
    )
    found = jax.jit(functools.partial(token_losses, r_drop=5.0))(model, batch, key)
    assert float(np.max(divergences_BT)) > 0.01
    close(found[0], (2 * nll_BT + 5.0 * divergences_BT / 2) / 2, rtol=1e-4)
    close(found[1], nll_BT, rtol=1e-5)
    np.testing.assert_array_equal(found[2], logits[::2].astype(np.float32))
    # Where masks do not differ there is nothing to disagree about; a step counts a token once.
    for changes, is_same in ((dict(), True), (dict(dropout_rate=0.3), False)):
        losses = []
        for r_drop in (0.0, 5.0):
            model, state = begin(task, GRADIENT_DESCENT, **changes)
            step = make_train_step(model, GRADIENT_DESCENT, state, seed=0, r_drop=r_drop)
            _, metrics = step(state, put(batch))
            assert int(metrics["tokens"]) == np.count_nonzero(targets_BT)
            losses.append(float(metrics["loss"]))
        assert (losses[0] == pytest.approx(losses[1], rel=1e-5)) == is_same


@pytest.mark.parametrize(("task", "r_drop"), [("translation", 0.0), ("language_model", 5.0)])
def test_distillation_is_a_share_of_how_far_the_teacher_is(task, r_drop):
    """Its predictions without dropout, beside each reading's; in float64 from the logits."""
    changes = dict(dropout_rate=0.3)
    model, state = begin(task, GRADIENT_DESCENT, **changes)
    structure, wise = begin(task, GRADIENT_DESCENT, num_kv_heads=4, num_layers=2, **changes)
    batch = make_batch([[pair] for pair in sentences((3, 4), (2, 5), (3, 4))], 7, 5)
    key, targets_BT = jax.random.key(3), batch["target_tokens"]

    @jax.jit
    def logits_of(model, batch, key):
        return apply(model, batch, None if key is None else nnx.Rngs(dropout=key))

    def log_p(model, params, batch, key=None):
        logits = logits_of(nnx.merge(nnx.graphdef(model), params), batch, key)
        logits = np.asarray(logits, np.float64)
        return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))

    wanted = log_p(structure, wise.params, batch)
    losses = jax.jit(token_losses, static_argnames=("r_drop", "distillation"))
    own = losses(nnx.merge(nnx.graphdef(model), state.params), batch, key, r_drop=r_drop)
    readings = 2 if r_drop else 1
    again = jax.tree.map(lambda x, n=readings: np.repeat(x, n, axis=0), batch)
    found = log_p(model, state.params, again, key)
    wanted_each = np.repeat(wanted, readings, axis=0)
    far_BT = np.sum(np.exp(wanted_each) * (wanted_each - found), axis=-1)
    far_BT = np.mean(far_BT.reshape(-1, readings, *far_BT.shape[1:]), axis=1)
    assert np.min(far_BT[targets_BT > 0]) > 0.01
    taught = losses(
        nnx.merge(nnx.graphdef(model), state.params),
        batch,
        key,
        r_drop=r_drop,
        teacher=nnx.merge(nnx.graphdef(structure), wise.params),
        distillation=0.3,
    )
    close(taught[0], 0.7 * np.asarray(own[0]) + 0.3 * far_BT, rtol=1e-4, atol=1e-6)
    close(taught[1:], own[1:], rtol=1e-6)


@pytest.mark.slow
def test_dropout_depends_on_seed_and_step_alone():
    frozen, task = optax.sgd(0.0), "language_model"
    changes = dict(relu_dropout_rate=0.4)
    model, state = begin(task, frozen, **changes)
    batch = put(random_batch())

    def loss(train_step, step):
        _, state = begin(task, frozen, **changes)
        state = dataclasses.replace(state, step=jnp.full_like(state.step, step))
        return float(train_step(state, batch)[1]["loss"])

    one, other = (make_train_step(model, frozen, state, seed=seed) for seed in (5, 6))
    losses = [loss(one, step) for step in range(20)]
    assert [loss(one, step) for step in range(3)] == losses[:3]
    assert len({*losses, loss(other, 0), loss(other, 1)}) == 22
    # There are no masks in evaluation, where the loss is about what they average to.
    eval_step = make_eval_step(model, mesh_of(1, 1, 1))
    evaluated = float(mean_metrics(eval_step(state.params, batch))["loss"])
    assert evaluated not in losses
    np.testing.assert_allclose(np.mean(losses), evaluated, rtol=0.05)


@pytest.mark.parametrize("quantized", [None, "fp8"])
def test_an_evaluation_of_float8_leaves_its_products_to_cublas(quantized, monkeypatch):
    """For one of them XLA on an NVIDIA GPU would take minutes."""
    mesh, options, jit = mesh_of(1, 1, 1), [], jax.jit
    model = build_model("language_model", SIZES | dict(quantized=quantized), rngs=nnx.Rngs(0))
    monkeypatch.setattr(devices, "_is_nvidia", lambda: True)
    monkeypatch.setattr(jax, "jit", lambda *args, **own: options.append(own) or jit(*args, **own))
    make_eval_step(model, mesh)
    expected = {} if quantized is None else {"xla_gpu_enable_triton_gemm": False}
    assert options[-1].get("compiler_options") == expected


@pytest.mark.slow
@both_tasks
def test_parts_of_a_batch_add_up_to_the_whole(task):
    """Parts have different numbers of tokens, so that a mean of their means would be another."""
    pairs = sentences((3, 4), (2, 5), (3, 1), (2, 2), (6, 5), (1, 1))
    batch = put(make_batch([[pair] for pair in pairs], 7, 5))
    model, state = begin(task, GRADIENT_DESCENT)
    results = {}
    for parts in (1, 2, 3):
        _, state = begin(task, GRADIENT_DESCENT)
        step = make_train_step(model, GRADIENT_DESCENT, state, seed=0, accumulate=parts)
        state, metrics = step(state, batch)
        results[parts] = (state.params, metrics)
    for parts in (2, 3):
        close(results[parts], results[1], rtol=1e-4, atol=1e-5)


def test_parts_that_do_not_divide_a_batch():
    model, state = begin("language_model", GRADIENT_DESCENT)
    with pytest.raises(ValueError, match="accumulate must be at least 1, not 0"):
        make_train_step(model, GRADIENT_DESCENT, state, seed=0, accumulate=0)
    step = make_train_step(model, GRADIENT_DESCENT, state, seed=0, accumulate=3)
    with pytest.raises(ValueError, match="a batch of 8 rows cannot be taken in 3 parts"):
        step(state, put(random_batch()))


def test_a_state_on_no_mesh():
    model, state = begin("language_model", GRADIENT_DESCENT)
    state = dataclasses.replace(state, step=jnp.int32(0))
    with pytest.raises(ValueError, match="the state must lie on a mesh, as init_state makes it"):
        make_train_step(model, GRADIENT_DESCENT, state, seed=0)


@pytest.mark.slow
@both_tasks
def test_rematerialization_saves_memory_and_changes_nothing(task):
    batch, results, memory, remats = put(random_batch()), [], [], []
    for remat in (False, True):
        changes = dict(dropout_rate=0.2, num_layers=3, remat=remat)
        model, state = begin(task, GRADIENT_DESCENT, **changes)
        step = make_train_step(model, GRADIENT_DESCENT, state, seed=0)
        remats.append(str(step.trace(state, batch).jaxpr).count("remat"))
        memory.append(step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes)
        results.append(jax.tree.leaves(step(state, batch)))
    close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert remats == [0, 6 if task == "translation" else 3]
    # Older ones, on a CPU, merge what is computed again with what was there.
    if jax.__version_info__ >= (0, 12):
        assert memory[1] < 0.8 * memory[0]


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(ADAMW, marks=pytest.mark.slow), ADAFACTOR],
    ids=["adamw", "adafactor"],
)
def test_a_step_that_is_not_finite_changes_nothing_but_the_position(optimizer):
    task = "language_model"
    model, state = begin(task, optimizer)
    step, batch = make_step(task, optimizer), put(random_batch())
    state, metrics = step(state, batch)
    assert float(metrics["skipped"]) == 0
    before = jax.device_get(state)
    outside = batch | dict(target_tokens=batch["target_tokens"] + 99)  # ids without a vector
    state, metrics = step(state, outside)
    assert np.isnan(float(metrics["loss"])) and float(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, before.opt_state)
    assert int(state.step) == 2
    state, metrics = step(state, batch)
    assert float(metrics["skipped"]) == 0 and np.isfinite(float(metrics["loss"]))


def test_a_gradient_alone_that_is_not_finite_is_skipped_too(monkeypatch):
    """Though the loss is finite: the square root of 0 in a norm, say."""

    def spoiled(*args, **options):
        own = make_gradients(*args, **options)

        def gradients(*args):
            found, sums = own(*args)
            leaves, tree = jax.tree.flatten(found)
            return jax.tree.unflatten(tree, [leaves[0] * jnp.inf, *leaves[1:]]), sums

        return gradients

    model, state = begin("language_model", ADAFACTOR)
    monkeypatch.setattr("mqa_jax.train.step.make_gradients", spoiled)
    before = jax.device_get(state)
    step = make_train_step(model, ADAFACTOR, state, seed=0)
    state, metrics = step(state, put(random_batch()))
    assert np.isfinite(float(metrics["loss"])) and float(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)


@pytest.mark.slow
def test_parts_of_bfloat16_weights_add_up_in_float32():
    """512 parts of one row each: in bfloat16 the sum of the gradients would stop growing."""
    rows, changes = 512, dict(param_dtype="bfloat16", vocab_size=22)
    model, state = begin("language_model", GRADIENT_DESCENT, **changes)
    batch = put(random_batch(8))
    batch = jax.tree.map(lambda x: jnp.tile(x, (rows // 8, 1)), batch)
    norms = []
    for accumulate in (1, rows):
        _, state = begin("language_model", GRADIENT_DESCENT, **changes)
        step = make_train_step(model, GRADIENT_DESCENT, state, seed=0, accumulate=accumulate)
        _, metrics = step(state, batch)
        norms.append(float(metrics["gradient_norm"]))
        assert metrics["tokens"].dtype == jnp.int32 and int(metrics["tokens"]) == 5 * rows
    assert norms[1] == pytest.approx(norms[0], rel=5e-3)


@pytest.mark.slow
def test_a_step_of_bfloat16_weights_is_done_in_float32():
    """Of a whole batch: the means of the gradients, their norm, and the sum with the changes."""

    def norm_of(tree):
        leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
        return np.sqrt(sum(np.sum(x**2) for x in leaves))

    def update(gradients, _, params):
        # Of 1 and a little more than half a last bit, which bfloat16 would make half a last bit.
        changes = jax.tree.map(lambda x: jnp.full(x.shape, 2.0**-8 + 2.0**-20), params)
        return changes, gradients

    # Its state is the gradients that it was given.
    optimizer = optax.GradientTransformation(lambda params: params, update)
    task, changes = "language_model", dict(param_dtype="bfloat16")
    model, state = begin(task, optimizer, **changes)
    rows = 53  # Of 5 tokens: 265, which bfloat16 does not have.
    batch = put(random_batch(rows))
    raw, _ = jax.jit(make_gradients(model, mesh_of(1, 1, 1)))(
        state.params, batch, jax.random.key(0)
    )
    ones = jax.tree.map(jnp.ones_like, state.params)
    step = make_train_step(model, optimizer, state, seed=0)
    _, metrics = step(state, batch)
    wanted = norm_of(raw) / (5 * rows)
    assert float(metrics["gradient_norm"]) == pytest.approx(wanted, rel=1e-3)
    state = dataclasses.replace(begin(task, optimizer, **changes)[1], params=ones)
    state, metrics = step(state, batch)
    assert float(metrics["gradient_norm"]) == pytest.approx(norm_of(state.opt_state), rel=1e-5)
    for weight in jax.tree.leaves(state.params):
        assert weight.dtype == jnp.bfloat16
        np.testing.assert_array_equal(weight, np.full(weight.shape, 1 + 2.0**-7, weight.dtype))


@pytest.mark.parametrize(
    "option, message",
    [
        (dict(seed=-1), "seed must be from 0 to 4294967295, not -1"),
        (dict(seed=2**32), "seed must be from 0 to 4294967295, not 4294967296"),
        (dict(label_smoothing=1.5), "label_smoothing must be .* below 1, not 1.5"),
        (dict(z_loss=math.nan), "z_loss must be .* not nan"),
        (dict(r_drop=-1.0), "r_drop must be .* not -1"),
        (dict(distillation=1.5), "distillation must be .* not 1.5"),
        (dict(distillation=0.5), "distillation 0.5 without a teacher: they go together"),
        (
            dict(teacher=initial("language_model", GRADIENT_DESCENT)[0]),
            "distillation 0.0 with a teacher: they go together",
        ),
        (dict(accumulate=2.0), "accumulate must be an integer, not 2.0"),
    ],
)
def test_options_of_a_step_that_make_no_sense(option, message):
    model, state = initial("language_model", GRADIENT_DESCENT)
    with pytest.raises(ValueError, match=message):
        make_train_step(model, GRADIENT_DESCENT, state, **dict(seed=0) | option)
