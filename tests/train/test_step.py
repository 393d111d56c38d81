"""Loss, schedule, optimizers, and the train and eval steps, on one device and on eight.

B batch   S source length   T target length   V vocabulary
"""

import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from mqa_jax.core.sharding import MESH_AXES, make_mesh
from mqa_jax.data import BOS_ID, EOS_ID
from mqa_jax.data.packing import pack, to_tokens
from mqa_jax.model.transformer import MODELS, build_model
from mqa_jax.train.optimizer import build_optimizer, rsqrt_schedule
from mqa_jax.train.setup import train_flops
from mqa_jax.train.state import init_state
from mqa_jax.train.step import (
    cross_entropy,
    make_eval_step,
    make_train_step,
    mean_metrics,
    segments,
)

MAX_LENGTH = 16
SIZES = dict(
    vocab_size=22,
    d_model=14,
    d_ff=18,
    num_layers=1,
    num_heads=4,
    num_kv_heads=1,
    head_dim=5,
    max_length=MAX_LENGTH,
)
both_tasks = pytest.mark.parametrize("task", MODELS)


# The loss


@pytest.mark.parametrize("label_smoothing, z_loss", [(0, 0), (0.1, 0), (0, 1e-2), (0.3, 1e-3)])
def test_cross_entropy_is_that_of_one_hot_targets(label_smoothing, z_loss):
    rng = np.random.default_rng(0)
    logits_BTV = jnp.asarray(rng.normal(scale=3, size=(2, 5, 7)), jnp.float32)
    targets_BT = jnp.asarray(rng.integers(0, 7, (2, 5)))
    options = dict(label_smoothing=label_smoothing, z_loss=z_loss)
    loss_BT, nll_BT = cross_entropy(logits_BTV, targets_BT, **options)
    labels_BTV = optax.smooth_labels(jax.nn.one_hot(targets_BT, 7), label_smoothing)
    expected_BT = optax.softmax_cross_entropy(logits_BTV, labels_BTV)
    expected_BT += z_loss * jax.nn.logsumexp(logits_BTV, axis=-1) ** 2
    np.testing.assert_allclose(loss_BT, expected_BT, rtol=1e-5)
    expected_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    np.testing.assert_allclose(nll_BT, expected_BT, rtol=1e-5)

    def total(logits_BTV):
        return jnp.sum(cross_entropy(logits_BTV, targets_BT, **options)[0])

    # Differences of float32 values of about 100, over steps of 0.01.
    check_grads(total, (logits_BTV,), order=1, modes=["rev"], rtol=1e-2, atol=1e-2, eps=1e-2)


def test_cross_entropy_by_hand():
    logits_BTV, targets_BT = jnp.log(jnp.array([[[1.0, 3.0], [2.0, 2.0]]])), jnp.array([[1, 0]])
    loss_BT, nll_BT = cross_entropy(logits_BTV, targets_BT, label_smoothing=0.2, z_loss=0.1)
    np.testing.assert_allclose(nll_BT, [[np.log(4 / 3), np.log(2)]], rtol=1e-6)
    first = 0.8 * np.log(4 / 3) + 0.2 * (np.log(4 / 3) + np.log(4)) / 2 + 0.1 * np.log(4) ** 2
    second = np.log(2) + 0.1 * np.log(4) ** 2
    np.testing.assert_allclose(loss_BT, [[first, second]], rtol=1e-6)


# The schedule and the optimizers

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


# Steps


@jax.numpy_dtype_promotion("standard")
def leniently(function, *args):
    return function(*args)


def lenient(optimizer):
    """Optax promotes integer step counts to float, which the strictness of these tests forbids."""
    return optimizer._replace(update=functools.partial(leniently, optimizer.update))


ADAMW = lenient(build_optimizer("adamw", lambda _: 0.01, weight_decay=0.01))
ADAFACTOR = lenient(build_optimizer("adafactor", lambda _: 0.05))
GRADIENT_DESCENT = optax.sgd(1.0)  # The weights then differ by the gradient.


def mesh_of(*sizes):
    if sizes != (1, 1, 1):
        return make_mesh(*sizes)
    return jax.make_mesh(sizes, MESH_AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1])


@functools.cache
def initial(task, optimizer, sizes=(1, 1, 1), **changes):
    build = functools.partial(build_model, task, SIZES | changes)
    return init_state(build, optimizer, mesh_of(*sizes), 3)


def begin(task, optimizer, sizes=(1, 1, 1), **changes):
    """The model, and a state of one's own, which may be donated."""
    model, state = initial(task, optimizer, sizes, **changes)
    return model, jax.tree.map(jnp.copy, state)


def put(batch, sizes=(1, 1, 1)):
    return jax.device_put(batch, NamedSharding(mesh_of(*sizes), PartitionSpec(("data", "fsdp"))))


def sentences(*lengths):
    """Pairs of them, of these lengths with their EOS."""
    rng = np.random.default_rng(0)
    return [
        tuple(np.append(rng.integers(3, 22, n - 1), EOS_ID).astype(np.int32) for n in pair)
        for pair in lengths
    ]


def make_batch(rows, source_length, target_length):
    """Rows of pairs of sentences, one behind the other."""
    lengths = source_length, target_length
    source, target = np.split(
        np.array([to_tokens(row, *lengths) for row in rows]), [source_length], axis=1
    )
    return dict(source_tokens=source, target_tokens=target)


def close(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), actual, expected)


def test_segments_by_hand():
    tokens = [[11, 12, 2, 13, 2, 0, 0], [0] * 7, [14, 15, 16, 17, 18, 19, 2], [2, 2, 0, 0, 0, 0, 0]]
    segment_ids, positions = segments(jnp.array(tokens, jnp.int32))
    assert segment_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0], [0] * 7, [1] * 7, [1, 2] + [0] * 5]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0] * 7, [*range(7)], [0] * 7]
    assert segment_ids.dtype == positions.dtype == jnp.int32


@given(st.lists(st.tuples(st.integers(1, 11), st.integers(1, 13)), min_size=1, max_size=30))
@settings(deadline=None)
def test_segments_are_the_sentences_that_were_packed(lengths):
    (*rows,) = pack(sentences(*lengths), 11, 13)
    batch = make_batch(rows, 11, 13)
    for i, side in enumerate(("source", "target")):
        tokens = batch[f"{side}_tokens"]
        segment_ids, positions = map(np.asarray, segments(tokens))
        for row, row_tokens, row_ids, row_positions in zip(
            rows, tokens, segment_ids, positions, strict=True
        ):
            for segment, pair in enumerate(row, start=1):
                assert row_tokens[row_ids == segment].tolist() == pair[i].tolist()
                assert row_positions[row_ids == segment].tolist() == [*range(len(pair[i]))]
            assert row_ids.max() == len(row)
            assert (
                np.all((row_ids == 0) == (row_tokens == 0))
                and not row_positions[row_ids == 0].any()
            )


def random_batch(rows=8):
    return make_batch([[pair] for pair in sentences(*[(6, 5)] * rows)], 7, 5)


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


def test_mean_metrics_of_sums():
    sums = dict(
        loss=jnp.array(6.0), nll=jnp.array(5.0), right=jnp.array(1.0), tokens=jnp.array(4.0)
    )
    means = dict(loss=1.5, ln_perplexity=1.25, accuracy=0.25, tokens=4.0)
    assert {name: float(x) for name, x in mean_metrics(sums).items()} == means
    nothing = jax.tree.map(jnp.zeros_like, sums)
    assert set(map(float, mean_metrics(nothing).values())) == {0.0}


@functools.cache
def make_step(task, optimizer, sizes=(1, 1, 1)):
    model, state = initial(task, optimizer, sizes)
    return make_train_step(model, optimizer, state, seed=0, label_smoothing=0.1, z_loss=1e-4)


@pytest.mark.parametrize("task, optimizer", [("translation", ADAMW), ("language_model", ADAFACTOR)])
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
def test_evaluation_is_split_as_training_is(task):
    sums = {}
    for sizes in ((1, 1, 1), (2, 2, 2)):
        model, state = begin(task, GRADIENT_DESCENT, sizes)
        eval_step, batch = make_eval_step(model, mesh_of(*sizes)), put(random_batch(), sizes)
        # Of the embeddings and each layer; what XLA would do without, one cannot tell.
        assert "sharding_constraint" in str(jax.make_jaxpr(eval_step)(state.params, batch))
        sums[sizes] = jax.device_get(eval_step(state.params, batch))
    close(sums[1, 1, 1], sums[2, 2, 2], rtol=1e-5)


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


def test_flops_of_a_step():
    """By hand: D=14, F=18, N=4, K=1, H=5, V=22, two layers; three rows of 7 source, 5 target."""
    heads, ff = 14 * 5 * (4 + 1 + 1 + 4), 2 * 14 * 18
    encoder = 7 * 2 * (heads + ff) + 4 * 4 * 5 * 7 * 7
    decoder = 5 * 2 * (heads + ff) + 4 * 4 * 5 * 5 * 5
    cross = 5 * 2 * 14 * 5 * 8 + 7 * 2 * 14 * 5 * 2 + 4 * 4 * 5 * 5 * 7
    softmax = 5 * 2 * 14 * 22
    expected = dict(translation=2 * (encoder + decoder + cross), language_model=2 * decoder)
    for task, layers in expected.items():
        model, _ = initial(task, GRADIENT_DESCENT, num_layers=2)
        assert train_flops(model, 3, 7, 5) == 3 * 3 * (layers + softmax)


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


@pytest.mark.parametrize("optimizer", [ADAMW, ADAFACTOR])
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


# Meshes

SHARD_SHAPES = {  # Of the sizes above, on the mesh (2, 2, 2).
    "embedding/table": (11, 7),
    "positions/table": (MAX_LENGTH, 7),
    "attention/query": (2, 5, 7),
    "attention/key": (1, 5, 7),
    "attention/value": (1, 5, 7),
    "attention/out": (7, 2, 5),
    "feed_forward/wi": (9, 7),
    "feed_forward/wo": (7, 9),
    "scale": None,
}


def named(tree):
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_no_device_ever_holds_more_of_a_weight_than_its_part(monkeypatch):
    """What is made on one device, and then moved, is small: the norms' scales."""
    moved = []
    original = jax.device_put

    def device_put(tree, *args, **kwargs):
        moved.extend(
            x.size
            for x in jax.tree.leaves(tree)
            if isinstance(x, jax.Array) and x.is_fully_addressable and len(x.devices()) == 1
        )
        return original(tree, *args, **kwargs)

    monkeypatch.setattr(jax, "device_put", device_put)
    build = functools.partial(build_model, "translation", SIZES)
    init_state(build, ADAMW, make_mesh(2, 2, 2), 3)
    assert moved and max(moved) <= SIZES["d_model"]


def test_each_weight_is_made_where_it_belongs():
    _, state = initial("translation", ADAMW, (2, 2, 2))
    _, alone = initial("translation", ADAMW)
    # JAX would call Python for each Variable at every step.
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    assert not any(map(is_variable, jax.tree.leaves(state, is_leaf=is_variable)))
    weights, seen = named(state.params), set()
    for name, x in weights.items():
        kind = next(kind for kind in SHARD_SHAPES if kind in name)
        seen.add(kind)
        shards = {shard.data.shape for shard in x.addressable_shards}
        # Norms are replicated, or split as D is: 14 numbers, so either will do.
        expected = {SHARD_SHAPES[kind]} if SHARD_SHAPES[kind] else shards & {(14,), (7,)}
        assert shards == expected, name
        assert len(x.addressable_shards) == 8
        # Vectors of another length round the normal distribution's inverse in other places.
        np.testing.assert_allclose(x, named(alone.params)[name], rtol=1e-6, err_msg=name)
    assert seen == set(SHARD_SHAPES)

    moments = {name: x for name, x in named(state.opt_state).items() if x.ndim}
    assert len(moments) == 2 * len(weights)
    for name, x in moments.items():
        weight = next(w for suffix, w in weights.items() if name.endswith(f"/{suffix}"))
        assert x.sharding.is_equivalent_to(weight.sharding, x.ndim), name
    for x in (state.step, *(x for x in jax.tree.leaves(state.opt_state) if not x.ndim)):
        assert len(x.sharding.device_set) == 8 and x.sharding.is_fully_replicated


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
def loss_curve(task, sizes, **changes):
    """The losses of 20 steps."""
    sizes_of_model = dict(SIZES, num_heads=8, vocab_size=24, d_model=16, d_ff=24) | changes
    build = functools.partial(build_model, task, sizes_of_model)
    optimizer = lenient(build_optimizer("adafactor", lambda _: 0.02))
    model, state = init_state(build, optimizer, mesh_of(*sizes), 3)
    step = make_train_step(model, optimizer, state, seed=0, label_smoothing=0.1)
    batch, losses = put(random_batch(), sizes), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize("num_kv_heads", [8, 1])
@both_tasks
def test_the_loss_curve_is_that_of_one_device(task, num_kv_heads, sizes):
    expected = loss_curve(task, (1, 1, 1), num_kv_heads=num_kv_heads)
    assert expected[-1] < 0.8 * expected[0]
    actual = loss_curve(task, sizes, num_kv_heads=num_kv_heads)
    # Sums in another order, which twenty updates carry along.
    np.testing.assert_allclose(actual, expected, rtol=2e-3)


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


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_a_mesh_changes_nothing_but_the_place(sizes):
    expected_metrics, expected_params, _ = three_steps((1, 1, 1))
    metrics, params, compilations = three_steps(sizes)
    assert len(compilations) == 1, compilations
    # float32 sums over 40 tokens in another order; AdamW then divides small by small.
    np.testing.assert_allclose(metrics, expected_metrics, rtol=1e-4)
    close(params, expected_params, rtol=1e-3, atol=1e-3)
