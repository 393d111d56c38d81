"""Attention as a pure function.

One code path serves multi-head, grouped-query and multi-query attention. With `N` query heads and
`K` key/value heads the queries are viewed as `[B, T, K, G, H]`, `G = N / K`; keys and values are
never repeated to `N` heads. `K = N` is multi-head attention, `K = 1` is multi-query attention
(Shazeer 2019, section 3).

Array letters, those of `jax.nn.dot_product_attention`:
  B batch   T query length   S key/value length   N query heads   K key/value heads
  G query heads per key/value head   R rows, G * T   H head dim
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from mqa_jax.attention.masks import causal_mask, check_bias, check_mask, check_window
from mqa_jax.attention.products import query_key, weights_value
from mqa_jax.core.arrays import as_floats
from mqa_jax.core.checks import check_number
from mqa_jax.core.explicit import automatic, spec
from mqa_jax.core.quantized import Held, Quantized

# Queries of longer sequences are taken block by block, so that memory grows with the length and
# not with its square.
QUERY_BLOCK = 512


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("scale", "bias"), meta_fields=("softcap",)
)
@dataclasses.dataclass(frozen=True)
class Logits:
    """What becomes of the products of queries with keys before the softmax.

    Attributes:
      scale: what they are multiplied by; `H ** -0.5` when None.
      bias: what is added then, `[B, N, T, S]`, of which axes but the last may be 1.
      softcap: what bounds them then: `c tanh(x / c)`.
    """

    scale: float | Array | None = None
    bias: Array | None = None
    softcap: float | None = None

    def __call__(self, product_BKGTS: Array, head_dim: int) -> Array:
        logits_BKGTS = product_BKGTS * (head_dim**-0.5 if self.scale is None else self.scale)
        if self.bias is not None:
            bias_BKGTS = by_group(self.bias, product_BKGTS.shape[1])
            logits_BKGTS += bias_BKGTS.astype(logits_BKGTS.dtype)
        if self.softcap is not None:
            logits_BKGTS = self.softcap * jnp.tanh(logits_BKGTS / self.softcap)
        return logits_BKGTS


PLAIN = Logits()


@automatic(lambda query_BTNH, **_: spec(query_BTNH))
def dot_product_attention(
    query_BTNH: ArrayLike,
    key_BSKH: ArrayLike,
    value_BSKH: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | Array | None = None,
    softcap: float | None = None,
) -> Array:
    """Scaled dot-product attention in which `N / K` query heads share each key/value head.

    `K = N` is multi-head attention; `K = 1` is the paper's multi-query attention (Shazeer 2019,
    section 3, where keys and values have no heads axis at all). The softmax is taken in float32
    whatever the dtype of the inputs.

    What the mask hides from a query has no influence on it, not even where it is NaN or infinite,
    and none on the gradients that come from it. A NaN that a query does see makes it NaN.

    Args:
      query_BTNH: queries.
      key_BSKH: keys; `K` must divide `N`.
      value_BSKH: values, of the keys' shape.
      mask: bool, broadcastable to `[B, N, T, S]` and of rank 4; True = attend. A query that may
        attend to nothing yields zeros, with a zero gradient.
      bias: floats, broadcastable to `[B, N, T, S]` and of rank 4, added to the scaled logits. To
        hide keys use the mask: a bias of minus infinity does not keep a NaN out, hides nothing
        under a softcap, and a query that sees nothing else has NaN for its output.
      is_causal: query `t` sees keys `0..t`; needs `T == S`.
      window: query `t` sees keys `t - window + 1 .. t`, causal by itself; needs `T == S` (the
        paper's local attention, section 4.1, has `window = 32`).
      scale: what the logits are multiplied by; `H ** -0.5` when None.
      softcap: bounds the logits, bias included: `softcap * tanh(logits / softcap)`, above 0
        (Gemma 2).

    Returns:
      `[B, T, N, H]` in the dtype of the queries; zeros where there are no keys (`S = 0`).

    Raises:
      ValueError: arrays that are not floats, shapes that do not fit, a mask that is not bool, a
        window below 1, a scale that is not finite, a softcap not above 0, or a causal rule for
        `T != S` (which key the first query stands at would be a guess: pass a mask).
    """
    query_BTNH = as_floats("query_BTNH", query_BTNH)
    key_BSKH, value_BSKH = as_floats("key_BSKH", key_BSKH), as_floats("value_BSKH", value_BSKH)
    _check_shapes(query_BTNH, key_BSKH, value_BSKH)
    if isinstance(scale, jax.core.Tracer):
        if scale.shape or not jnp.issubdtype(scale.dtype, jnp.number):
            raise ValueError(f"scale must be one number, not {scale}")
    elif scale is not None:
        scale = check_number("scale", scale)
    if softcap is not None:
        softcap = check_number("softcap", softcap, above=0)
    batch, length = query_BTNH.shape[:2]
    shape_BNTS = batch, query_BTNH.shape[2], length, key_BSKH.shape[1]
    if mask is not None:
        mask = check_mask(mask, shape_BNTS)
    if bias is not None:
        bias = check_bias(bias, shape_BNTS)
    check_window(window)
    if is_causal or window is not None:
        if length != key_BSKH.shape[1]:
            raise ValueError(
                f"is_causal and window need as many queries as keys, but T={length} and "
                f"S={key_BSKH.shape[1]}: pass mask=causal_mask(query_positions, key_positions), "
                "or decode with a cache (Attention.decode)"
            )
        positions = jnp.arange(length)[None]
        causal = causal_mask(positions, positions, window)
        mask = causal if mask is None else mask & causal
    # A product of two dtypes is taken in the wider one.
    dtypes = (x.dtype for x in (query_BTNH, key_BSKH, value_BSKH))
    dtype = max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)
    key_BKSH, value_BKSH = (heads_first(x.astype(dtype)) for x in (key_BSKH, value_BSKH))
    logits = Logits(scale, bias, softcap)
    output_BTNH = attend(query_BTNH.astype(dtype), key_BKSH, value_BKSH, mask, logits)
    return output_BTNH.astype(query_BTNH.dtype)


def attend(
    query_BTNH: Array,
    key_BKSH: Held,
    value_BKSH: Held,
    mask: Array | None,
    logits: Logits = PLAIN,
) -> Array:
    """As `dot_product_attention`, of what is checked already; keys and values in cache layout.

    What is hidden may be anything, such as slots of a cache that were never written. Keys and
    values may be of another dtype than the queries: they are read as they are.
    """
    if mask is None or 0 in (query_BTNH.size, key_BKSH.size):
        return attend_finite(query_BTNH, key_BKSH, value_BKSH, None, logits)
    return _attend_masked(query_BTNH, key_BKSH, value_BKSH, logits, mask)


@jax.custom_jvp
def _attend_masked(
    query_BTNH: Array, key_BKSH: Held, value_BKSH: Held, logits: Logits, mask: Array
) -> Array:
    return attend_finite(query_BTNH, key_BKSH, value_BKSH, mask, logits, hides_finite=False)


@_attend_masked.defjvp
def _attend_masked_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """The gradient would multiply what is hidden by zero, and so the arrays are made finite first.

    Not so in `_attend_masked`: a decode step has no gradient, and would read its cache twice.
    """
    *arrays, mask = primals

    def attend(query_BTNH: Array, key_BKSH: Array, value_BKSH: Array, logits: Logits) -> Array:
        return spoil(*attend_seen(query_BTNH, key_BKSH, value_BKSH, mask, logits))

    return jax.jvp(attend, tuple(arrays), tuple(tangents[:-1]))


def attend_seen(
    query_BTNH: Array,
    key_BKSH: Array,
    value_BKSH: Array,
    mask: Array,
    logits: Logits = PLAIN,
    dropout: Callable[[Array], Array] | None = None,
) -> tuple[Array, Array]:
    """As `attend_finite`, of what need not be finite; and bool `[B, T, N]`, which outputs are NaN.

    They come out finite, for `spoil` behind the last product: a weight's gradient in one would be
    NaN even where the loss leaves them out.
    """
    query_BTNH, is_bad_BTN = finite(query_BTNH)
    if 0 in (query_BTNH.size, key_BKSH.size):
        return jnp.zeros_like(query_BTNH), is_bad_BTN
    (key_BKSH, is_bad_key_BKS), (value_BKSH, is_bad_value_BKS) = map(finite, (key_BKSH, value_BKSH))
    if logits.bias is not None and logits.softcap is not None:
        # What hides a bias is behind the cap, whose slope would be NaN there.
        logits = dataclasses.replace(logits, bias=jnp.where(mask, logits.bias, 0.0))
    output_BTNH = attend_finite(query_BTNH, key_BKSH, value_BKSH, mask, logits, dropout)
    sees_bad_BKGT = _sees(by_group(mask, key_BKSH.shape[1]), is_bad_key_BKS | is_bad_value_BKS)
    # `G` and `T` may be 1 in here, and are not in the queries.
    is_bad_BTKG = is_bad_BTN.reshape(*is_bad_BTN.shape[:2], key_BKSH.shape[1], -1)
    is_bad_BTKG |= jnp.moveaxis(sees_bad_BKGT, 3, 1)
    return output_BTNH, is_bad_BTKG.reshape(is_bad_BTN.shape)


@overload
def finite(x: Array) -> tuple[Array, Array]: ...
@overload
def finite(x: Quantized) -> tuple[Quantized, Array]: ...


def finite(x: Held) -> tuple[Held, Array]:
    """`x` with zeros for what is not finite; and which vectors, its last axis, were not."""
    if isinstance(x, Quantized):  # Whose scales tell.
        is_finite = jnp.isfinite(x.scales)
        return dataclasses.replace(x, scales=jnp.where(is_finite, x.scales, 0.0)), ~is_finite
    is_finite = jnp.isfinite(x)
    return jnp.where(is_finite, x, jnp.zeros((), x.dtype)), ~jnp.all(is_finite, axis=-1)


def spoil(x: Array, is_spoiled: Array) -> Array:
    """`x` with NaN for the vectors that are marked. A sum, so that their gradient goes on."""
    return x + jnp.where(is_spoiled, jnp.nan, 0.0).astype(x.dtype)[..., None]


def by_group(mask: Array, num_kv_heads: int) -> Array:
    """A mask or bias `[B, N, T, S]`, whose axes may be 1, as `[B, K, G, T, S]`."""
    if mask.shape[1] == 1:
        return mask[:, :, None]
    return mask.reshape(mask.shape[0], num_kv_heads, -1, *mask.shape[2:])


def _sees(mask_BKGTS: Array, is_bad_BKS: Array) -> Array:
    """bool `[B, K, G, T]`, or 1 where the mask has 1: which queries see a key that is marked."""
    return jnp.any(mask_BKGTS & is_bad_BKS[:, :, None, None], axis=-1)


def attend_finite(
    query_BTNH: Array,
    key_BKSH: Held,
    value_BKSH: Held,
    mask: Array | None,
    logits: Logits = PLAIN,
    dropout: Callable[[Array], Array] | None = None,
    hides_finite: bool = True,
) -> Array:
    """The attention every public name of this file ends in, for arrays that are finite.

    With `hides_finite=False` keys and values that are hidden may be anything; without a gradient.
    """
    if 0 in (query_BTNH.size, key_BKSH.size):
        return jnp.zeros_like(query_BTNH)
    length = query_BTNH.shape[1]
    # A mask of dropout belongs to all queries at once.
    if length <= 2 * QUERY_BLOCK or dropout is not None:
        return _attend_block(query_BTNH, key_BKSH, value_BKSH, mask, logits, dropout, hides_finite)
    blocks = -(-length // QUERY_BLOCK)

    def split(x: Array, axis: int) -> Array:
        """The axis of queries in blocks, which come first."""
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, blocks * QUERY_BLOCK - length)
        x = jnp.pad(x, padding)
        return jnp.moveaxis(
            x.reshape(*x.shape[:axis], blocks, QUERY_BLOCK, *x.shape[axis + 1 :]), axis, 0
        )

    def split_rows(x: Array | None) -> Array | None:
        """None where all queries have the same, if any."""
        return None if x is None or x.shape[2] == 1 else split(x, 2)

    @jax.checkpoint  # Backward computes the logits of a block again, else it would keep them all.
    def attend(block: tuple[Array, Array | None, Array | None]) -> Array:
        query, block_mask, block_bias = block
        of_block = dataclasses.replace(
            logits, bias=logits.bias if block_bias is None else block_bias
        )
        if block_mask is None:
            block_mask = mask
        return _attend_block(query, key_BKSH, value_BKSH, block_mask, of_block, None, hides_finite)

    output = lax.map(attend, (split(query_BTNH, 1), split_rows(mask), split_rows(logits.bias)))
    return jnp.moveaxis(output, 0, 1).reshape(query_BTNH.shape[0], -1, *query_BTNH.shape[2:])[
        :, :length
    ]


def _attend_block(
    query_BTNH: Array,
    key_BKSH: Held,
    value_BKSH: Held,
    mask: Array | None,
    logits: Logits,
    dropout: Callable[[Array], Array] | None,
    hides_finite: bool,
) -> Array:
    batch, length, _, head_dim = query_BTNH.shape
    num_kv_heads = key_BKSH.shape[1]
    query_BTKGH = query_BTNH.reshape(batch, length, num_kv_heads, -1, head_dim)
    query_BKGTH = jnp.moveaxis(query_BTKGH, 1, 3)
    # All that ask the same keys are rows of one matrix: for a product over two axes, G and T, XLA
    # takes a quarter longer on a CPU.
    query_BKRH = query_BKGTH.reshape(batch, num_kv_heads, -1, head_dim)
    key_BKSH, key_scales_BKS = _values_and_scales(key_BKSH)
    value_BKSH, value_scales_BKS = _values_and_scales(value_BKSH)
    product_BKRS = query_key(query_BKRH, key_BKSH)
    if key_scales_BKS is not None:
        product_BKRS *= key_scales_BKS[:, :, None]
    product_BKGTS = product_BKRS.reshape(*query_BKGTH.shape[:4], -1)
    logits_BKGTS = logits(product_BKGTS, head_dim)
    if mask is not None:
        mask = by_group(mask, num_kv_heads)
        # A finite fill, so that a row with every key masked has a finite softmax (and gradient);
        # the second `where` then makes that row zero, as documented.
        logits_BKGTS = jnp.where(mask, logits_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(logits_BKGTS)
    if value_scales_BKS is not None:
        weights_BKGTS *= value_scales_BKS[:, :, None, None]
    if mask is not None:
        weights_BKGTS = jnp.where(mask, weights_BKGTS, 0.0)
    dtype = value_BKSH.dtype if value_scales_BKS is None else query_BTNH.dtype
    weights_BKGTS = weights_BKGTS.astype(dtype)
    if dropout is not None:
        weights_BKGTS = dropout(weights_BKGTS)
    # Of eight bits the numbers are finite, and what hides a scale is the mask, above.
    if hides_finite or mask is None or value_scales_BKS is not None:
        weights_BKRS = weights_BKGTS.reshape(*query_BKRH.shape[:3], -1)
        output_BKRH = weights_value(weights_BKRS, value_BKSH)
    else:
        output_BKRH = _weights_seen_value(weights_BKGTS, value_BKSH, mask)
    output_BKGTH = output_BKRH.reshape(query_BKGTH.shape)
    output_BTKGH = jnp.moveaxis(output_BKGTH, 3, 1)
    return output_BTKGH.reshape(query_BTNH.shape).astype(query_BTNH.dtype)


def _values_and_scales(x: Held) -> tuple[Array, Array | None]:
    return (x.values, x.scales) if isinstance(x, Quantized) else (x, None)


@jax.jit
def _weights_seen_value(weights_BKGTS: Array, value_BKSH: Array, mask_BKGTS: Array) -> Array:
    """`[B, K, R, H]`, from values of which those that the mask hides may be anything.

    A hidden NaN times a weight of 0 is NaN. Where all rows of a head see the same, values can be
    hidden on their way into a product that the compiler fuses them with. XLA on a CPU does not, and
    to hide them on their way into a sum makes a step take a sixth more time; so there the output is
    looked at, and made again where it is not finite: that reads nothing twice. So it is, but on a
    GPU, where rows see different keys.
    """
    weights_BKRS = weights_BKGTS.reshape(*weights_BKGTS.shape[:2], -1, weights_BKGTS.shape[-1])
    sees_alike = mask_BKGTS.shape[2:4] == (1, 1)

    def hidden(weights_BKRS: Array, value_BKSH: Array, mask_BKGTS: Array) -> Array:
        if sees_alike or weights_BKRS.shape[2] == 1:
            return weights_value(weights_BKRS, value_BKSH, mask_BKGTS[:, :, 0, 0])
        value_BKSH, is_bad_BKS = finite(value_BKSH)
        sees_bad_BKGT = jnp.broadcast_to(_sees(mask_BKGTS, is_bad_BKS), weights_BKGTS.shape[:4])
        output_BKRH = weights_value(weights_BKRS, value_BKSH)
        return spoil(output_BKRH, sees_bad_BKGT.reshape(output_BKRH.shape[:3]))

    def checked(weights_BKRS: Array, value_BKSH: Array, mask_BKGTS: Array) -> Array:
        output_BKRH = weights_value(weights_BKRS, value_BKSH)
        return lax.cond(
            jnp.all(jnp.isfinite(output_BKRH)),
            lambda *_: output_BKRH,
            hidden,
            weights_BKRS,
            value_BKSH,
            mask_BKGTS,
        )

    arguments = weights_BKRS, value_BKSH, mask_BKGTS
    if sees_alike:
        return lax.platform_dependent(*arguments, cpu=checked, default=hidden)
    return lax.platform_dependent(*arguments, cpu=checked, tpu=checked, default=hidden)


def heads_first(x_BSKH: Array) -> Array:
    """`[B, S, K, H]` in cache layout, `[B, K, S, H]`."""
    return jnp.swapaxes(x_BSKH, 1, 2)


def _check_shapes(query_BTNH: Array, key_BSKH: Array, value_BSKH: Array) -> None:
    shapes = f"query {query_BTNH.shape}, key {key_BSKH.shape}, value {value_BSKH.shape}"
    if query_BTNH.ndim != 4 or key_BSKH.ndim != 4 or key_BSKH.shape != value_BSKH.shape:
        raise ValueError(
            f"expected query [B, T, N, H] and key and value alike [B, S, K, H], but got {shapes}"
        )
    batch, _, num_heads, head_dim = query_BTNH.shape
    if 0 in (num_heads, key_BSKH.shape[2], head_dim):
        raise ValueError(f"N, K and H must be at least 1, but got {shapes}")
    if key_BSKH.shape[0] != batch or key_BSKH.shape[3] != head_dim:
        raise ValueError(f"query and key must share B and H, but got {shapes}")
    if num_heads % key_BSKH.shape[2]:
        raise ValueError(
            f"the {key_BSKH.shape[2]} key/value heads do not divide the {num_heads} query heads: "
            f"{shapes}"
        )
