"""The loss by hand, what it is taken of, and the means that are made of it.

B batch   T target length   V vocabulary
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from stepping import SIZES, make_batch, mesh_of, sentences

from mqa_jax.data import SpecialIds
from mqa_jax.data.packing import pack
from mqa_jax.model.transformer import build_model
from mqa_jax.train.evaluate import add_up
from mqa_jax.train.loss import cross_entropy, mean_metrics, segments
from mqa_jax.train.step import make_eval_step


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


def test_segments_by_hand():
    tokens = [[11, 12, 2, 13, 2, 0, 0], [0] * 7, [14, 15, 16, 17, 18, 19, 2], [2, 2, 0, 0, 0, 0, 0]]
    segment_ids, positions = segments(jnp.array(tokens, jnp.int32))
    assert segment_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0], [0] * 7, [1] * 7, [1, 2] + [0] * 5]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0] * 7, [*range(7)], [0] * 7]
    assert segment_ids.dtype == positions.dtype == jnp.int32


@given(st.lists(st.tuples(st.integers(1, 11), st.integers(1, 13)), min_size=1, max_size=30))
@settings(deadline=None, max_examples=15)
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


def test_what_has_nothing_in_front_is_given_and_not_predicted():
    """The first token of each sentence is at position 0, as when a prompt begins with it."""
    model = build_model("language_model", SIZES, rngs=nnx.Rngs(0))
    rows = [[[7, 5, 9, 2], [11, 2]], [[3, 4, 2]]]
    ids = SpecialIds(pad=-1, bos=None, eos=2)
    tokens = np.full((2, 8), -1, np.int32)
    for row, packed in zip(tokens, rows, strict=True):
        row[: sum(map(len, packed))] = sum(packed, [])
    mesh = mesh_of(1, 1, 1)
    sums = make_eval_step(model, mesh, ids=ids)(nnx.state(model), {"target_tokens": tokens})
    total = 0.0
    for sentence in sum(rows, []):
        logits = np.asarray(model(np.array([sentence[:-1]])), np.float64)[0]
        log_prob = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        total -= log_prob[np.arange(len(sentence) - 1), sentence[1:]].sum()
    assert int(sums["tokens"]) == 3 + 1 + 2
    assert float(sums["loss"]) == pytest.approx(total, rel=1e-5)


def test_mean_metrics_of_sums():
    sums = dict(
        loss=jnp.array(6.0), nll=jnp.array(5.0), right=jnp.array(1.0), tokens=jnp.array(4.0)
    )
    means = dict(loss=1.5, ln_perplexity=1.25, accuracy=0.25, tokens=4.0)
    assert {name: float(x) for name, x in mean_metrics(sums).items()} == means
    nothing = jax.tree.map(jnp.zeros_like, sums)
    assert set(map(float, mean_metrics(nothing).values())) == {0.0}


def test_sums_of_a_split_know_every_token():
    """float32 knows no odd number above 2 ** 24, and a mean of such sums drifts."""
    batches = [dict(loss=np.float32(1), nll=np.float32(1), right=0, tokens=2**24 - 1)]
    batches += [dict(loss=np.float32(0.1), nll=np.float32(1), right=1, tokens=1)] * 5
    sums = add_up(batches)
    assert sums["tokens"] == 2**24 + 4 and sums["right"] == 5
    metrics = mean_metrics(sums)
    assert metrics["tokens"] == 2**24 + 4
    assert metrics["ln_perplexity"] == 6 / (2**24 + 4)


def test_the_loss_of_bfloat16_logits_is_that_of_the_same_in_float32():
    logits_BTV = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 1031)), jnp.bfloat16)
    targets_BT = jnp.ones((2, 3), jnp.int32)
    options = dict(label_smoothing=0.3, z_loss=1e-3)
    narrow = cross_entropy(logits_BTV, targets_BT, **options)
    wide = cross_entropy(logits_BTV.astype(jnp.float32), targets_BT, **options)
    for ours, theirs in zip(narrow, wide, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, theirs)
