"""The layers against their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mqa_jax.core.dropout import Dropout
from mqa_jax.core.norms import RMSNorm
from mqa_jax.model.layers import Embedding, FeedForward, Softmax

B, T, D, F, V = 2, 3, 5, 7, 11


def x_BTD(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (B, T, D), dtype)


def test_dropout_has_one_mask_for_all_positions_of_a_row():
    x = np.arange(1.0, 9)[:, None] * np.ones((6, 8, 50))
    dropped = np.asarray(Dropout(0.75)(jnp.asarray(x), rngs=nnx.Rngs(dropout=1)))
    kept = dropped[:, :1] > 0
    np.testing.assert_array_equal(dropped, 4 * x * kept)
    assert 0.15 < kept.mean() < 0.35
    assert len(np.unique(kept, axis=0)) == 6


def test_feed_forward_is_two_products_with_a_relu_between():
    layer = FeedForward(D, F, rngs=nnx.Rngs(0))
    wi, wo = np.asarray(layer.wi[...]), np.asarray(layer.wo[...])
    expected = np.maximum(np.asarray(x_BTD()) @ wi.T, 0) @ wo.T
    np.testing.assert_allclose(layer(x_BTD()), expected, rtol=1e-5, atol=1e-6)


def test_feed_forward_drops_behind_the_relu_where_rngs_are_given():
    layer = FeedForward(D, F, dropout_rate=0.5, rngs=nnx.Rngs(0))
    layer.wi[...] = jnp.ones((F, D))
    layer.wo[...] = jnp.zeros((D, F)).at[0, 0].set(1.0)
    x = jnp.ones((50, B, D))
    np.testing.assert_allclose(layer(x)[..., 0], D)
    # A unit is left out, or counts twice.
    dropped = layer(x, rngs=nnx.Rngs(dropout=1))[..., 0]
    assert np.unique(dropped).tolist() == [0.0, 2.0 * D]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm_scales_to_a_mean_square_of_one_in_float32(dtype):
    norm = RMSNorm(D, dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.arange(1.0, D + 1)
    x = x_BTD(dtype) * jnp.asarray(300, dtype)  # squares of this do not add up well in bfloat16
    wide = np.asarray(x, np.float32)
    expected = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True)) * np.arange(1.0, D + 1)
    assert norm(x).dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-8  # one rounding to bfloat16
    np.testing.assert_allclose(np.asarray(norm(x), np.float32), expected, rtol=tolerance)


def test_embedding_looks_up_rows():
    table = Embedding(V, D, rngs=nnx.Rngs(0))
    ids = jnp.array([[0, 10, 3], [4, 4, 1]])
    np.testing.assert_array_equal(table(ids), np.asarray(table.table[...])[np.asarray(ids)])


@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_of_a_frequent_id_add_up_in_float32(dtype, param_dtype):
    """In bfloat16 the sum of ones would stop at 256."""
    table = Embedding(5, 3, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    ids = jnp.concatenate([jnp.full(1000, 4), jnp.array([0, 5, -1])])

    def total(weights):
        vectors = nnx.merge(nnx.graphdef(table), weights)(ids)
        return jnp.sum(vectors[:1001].astype(jnp.float32))

    (gradient,) = jax.tree.leaves(jax.grad(total)(nnx.state(table)))
    expected = np.zeros((5, 3))
    expected[4], expected[0] = 1000, 1
    assert gradient.dtype == param_dtype
    np.testing.assert_array_equal(gradient.astype("float32"), expected)


@pytest.mark.parametrize("bad", [-1, -11, 11, 2**30])
def test_an_id_outside_the_table_is_nan_and_its_neighbours_are_not(bad):
    table = Embedding(V, D, rngs=nnx.Rngs(0))
    vectors = jax.jit(lambda ids: table(ids))(jnp.array([10, bad, 0]))
    assert np.isnan(vectors[1]).all() and np.isfinite(vectors[::2]).all()


def test_tied_logits_are_the_product_with_the_table_over_the_root_of_d():
    table = Embedding(V, D, rngs=nnx.Rngs(0))
    expected = np.asarray(x_BTD()) @ np.asarray(table.table[...]).T / np.sqrt(D)
    np.testing.assert_allclose(table.logits(x_BTD()), expected, rtol=1e-5, atol=1e-6)


def test_softmax_has_a_matrix_of_its_own():
    softmax = Softmax(D, V, rngs=nnx.Rngs(0))
    assert softmax.kernel.shape == (V, D)
    expected = np.asarray(x_BTD()) @ np.asarray(softmax.kernel[...]).T
    np.testing.assert_allclose(softmax.logits(x_BTD()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [Softmax, lambda d, v, **kw: Embedding(v, d, **kw)])
def test_logits_are_float32_for_bfloat16_activations(layer):
    logits = layer(D, V, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)).logits(x_BTD(jnp.bfloat16))
    assert logits.dtype == jnp.float32
    # Sums that were rounded to bfloat16 on the way would fit into 16 bits.
    assert (np.asarray(logits.astype(jnp.bfloat16), np.float32) != np.asarray(logits)).any()


@given(
    ids=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-12, 14), min_size=7, max_size=7)
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_id_gives_its_own_row_or_nan(ids):
    table = Embedding(V, D, rngs=nnx.Rngs(0))
    vectors = look_up(table, jnp.array(ids))
    for vector, i in zip(vectors, ids, strict=True):
        expected = table.table[i] if 0 <= i < V else np.full(D, np.nan)
        np.testing.assert_array_equal(vector, expected)


@jax.jit
def look_up(table, ids):
    return table(ids)


@pytest.mark.parametrize("layer", [Softmax, lambda d, v, **kw: Embedding(v, d, **kw)])
def test_logits_by_hand_are_not_rounded_to_bfloat16(layer):
    layer = layer(4, 1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    weight = layer.kernel if isinstance(layer, Softmax) else layer.table
    weight[...] = jnp.array([16.0, 1, 0, 0]).reshape(weight.shape)
    divisor = 1 if isinstance(layer, Softmax) else 2  # the root of D = 4
    # 256 + 1, which bfloat16 does not have.
    logits = layer.logits(jnp.array([[[16.0, 1, 0, 0]]]))
    np.testing.assert_array_equal(logits, [[[257 / divisor]]])


@pytest.mark.parametrize(
    ("make", "weights"),
    [  # axes and standard deviation of each weight, for sizes 41 and 59
        (FeedForward, dict(wi=("FD", 41**-0.5), wo=("DF", 59**-0.5))),
        (Softmax, dict(kernel=("VD", 41**-0.5))),
        (Embedding, dict(table=("VD", 1.0))),
        (functools.partial(Embedding, axes="PD"), dict(table=("PD", 1.0))),
    ],
)
def test_weights_name_their_axes_and_have_the_deviation_of_their_fan_in(make, weights):
    state = dict(nnx.to_flat_state(nnx.state(make(41, 59, rngs=nnx.Rngs(0)))))
    assert {path[0] for path in state} == weights.keys()
    for name, (axes, deviation) in weights.items():
        assert state[name,].get_metadata()["axes"] == axes
        values = np.asarray(state[name,][...])
        # Of 41 * 59 draws: one sigma is 1.5 % for the deviation, 2 % of it for the mean.
        np.testing.assert_allclose(values.std(), deviation, rtol=0.06)
        np.testing.assert_allclose(values.mean(), 0, atol=0.08 * deviation)


@pytest.mark.parametrize("make", [FeedForward, Embedding, Softmax])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_dtype_is_of_activations_and_param_dtype_of_weights(make, dtypes):
    def build():
        layer = make(3, 5, dtype=dtypes[0], param_dtype=dtypes[1], rngs=nnx.Rngs(0))
        x = jnp.zeros((1, 2), jnp.int32) if make is Embedding else jnp.zeros((1, 2, 3))
        output = layer.logits(x) if make is Softmax else layer(x)
        return output, jax.tree.leaves(nnx.state(layer))

    output, weights = nnx.eval_shape(build)
    assert {weight.dtype for weight in weights} == {jnp.dtype(dtypes[1])}
    assert output.dtype == ("float32" if make is Softmax else dtypes[0])
