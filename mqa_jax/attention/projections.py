"""What an attention module multiplies with, and where queries and keys are turned.

Array letters, those of `jax.nn.dot_product_attention`:
  B batch   T query length   S key/value length   N query heads   K key/value heads
  H head dim   D model dim
"""

import functools
from typing import Any, ClassVar, Required, TypedDict

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mqa_jax.attention.cache import (
    CrossCache,
    KVCache,
    RingCache,
    check_cache_dtype,
    held_spec,
)
from mqa_jax.attention.functional import Logits
from mqa_jax.attention.masks import check_window
from mqa_jax.attention.positions import Rope, Rotation
from mqa_jax.core.arrays import check_dtype
from mqa_jax.core.checks import check_integer, check_number
from mqa_jax.core.dropout import Dropout
from mqa_jax.core.explicit import explicit_mesh, partition, spec
from mqa_jax.core.linear import linear
from mqa_jax.core.norms import RMSNorm
from mqa_jax.core.sharding import batch_axes, param, zeros


class Options(TypedDict, total=False):
    """What `Attention` takes by name alone."""

    window: int | None
    rope: Rotation | None
    scale: float | None
    softcap: float | None
    qk_norm: bool
    norm_epsilon: float
    qkv_bias: bool
    out_bias: bool
    kernel_init: nnx.Initializer | None
    dropout_rate: float
    dtype: DTypeLike
    cache_dtype: DTypeLike | None
    param_dtype: DTypeLike
    rngs: Required[nnx.Rngs]


class Projections(nnx.Module):
    """The weights of `Attention`, whose docstring says what is what, and the products with them."""

    # Of each weight how many axes a product contracts.
    PRODUCTS: ClassVar = {"query": 1, "key": 1, "value": 1, "out": 2}

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        *,
        window: int | None = None,
        rope: Rotation | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        qk_norm: bool = False,
        norm_epsilon: float = 1e-6,
        qkv_bias: bool = False,
        out_bias: bool = False,
        kernel_init: nnx.Initializer | None = None,
        dropout_rate: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        cache_dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        d_model = check_integer("d_model", d_model)
        num_heads = check_integer("num_heads", num_heads)
        num_kv_heads = check_integer("num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}: each "
                "key/value head serves the same number of query heads"
            )
        if head_dim is None:
            if d_model % num_heads:
                raise ValueError(
                    f"num_heads={num_heads} does not divide d_model={d_model}: give head_dim"
                )
            head_dim = d_model // num_heads
        head_dim = check_integer("head_dim", head_dim)
        self.window = check_window(window)
        self.dtype = check_dtype("dtype", dtype)
        self.cache_dtype = (
            self.dtype if cache_dtype is None else check_cache_dtype("cache_dtype", cache_dtype)
        )
        self.dropout = Dropout(dropout_rate)
        if rope is not None and not callable(rope):
            raise ValueError(
                f"rope must be a Rope() or a function of x and positions, not {rope!r}"
            )
        if isinstance(rope, Rope):
            rope.frequencies(head_dim)  # Which raises where there are no halves.
        self.rope = rope
        self.scale = None if scale is None else check_number("scale", scale)
        self.softcap = None if softcap is None else check_number("softcap", softcap, above=0)
        dtypes = dict(dtype=self.dtype, param_dtype=check_dtype("param_dtype", param_dtype))
        weight = functools.partial(param, rngs=rngs, dtype=dtypes["param_dtype"], init=kernel_init)
        self.query = weight("NHD", (num_heads, head_dim, d_model), fan_in=d_model)
        self.key = weight("KHD", (num_kv_heads, head_dim, d_model), fan_in=d_model)
        self.value = weight("KHD", (num_kv_heads, head_dim, d_model), fan_in=d_model)
        self.out = weight("DNH", (d_model, num_heads, head_dim), fan_in=num_heads * head_dim)
        bias = functools.partial(zeros, dtype=dtypes["param_dtype"])
        self.query_bias = bias("NH", (num_heads, head_dim)) if qkv_bias else None
        self.key_bias = bias("KH", (num_kv_heads, head_dim)) if qkv_bias else None
        self.value_bias = bias("KH", (num_kv_heads, head_dim)) if qkv_bias else None
        self.out_bias = bias("D", (d_model,)) if out_bias else None
        norm = functools.partial(
            RMSNorm, head_dim, epsilon=norm_epsilon, axis="H", rngs=rngs, **dtypes
        )
        self.query_norm = norm() if qk_norm else None
        self.key_norm = norm() if qk_norm else None

    def project_query(self, x_BTD: Array, positions_BT: Array | None) -> Array:
        """`[B, T, N, H]`; turned where there are positions."""
        x_BTNH = self._project(x_BTD, self.query, self.query_bias)
        return self._placed(x_BTNH, self.query_norm, positions_BT)

    def project_key_value(self, x_BSD: Array, positions_BS: Array | None) -> tuple[Array, Array]:
        """`[B, S, K, H]` both; keys turned where there are positions."""
        key_BSKH = self._project(x_BSD, self.key, self.key_bias)
        value_BSKH = self._project(x_BSD, self.value, self.value_bias)
        return self._placed(key_BSKH, self.key_norm, positions_BS), value_BSKH

    def _placed(self, x_BTNH: Array, norm: RMSNorm | None, positions_BT: Array | None) -> Array:
        if norm is not None:
            x_BTNH = norm(x_BTNH)
        if self.rope is None or positions_BT is None:
            return x_BTNH
        turned_BTNH = self.rope(x_BTNH, positions_BT)
        if turned_BTNH.shape != x_BTNH.shape:
            raise ValueError(
                f"rope returned {list(turned_BTNH.shape)} for {list(x_BTNH.shape)}: it must keep "
                "the shape"
            )
        return turned_BTNH.astype(self.dtype)

    def _logits(self, bias: Array | None) -> Logits:
        return Logits(self.scale, bias, self.softcap)

    def _project(
        self, x: Array, weight: nnx.Param, bias: nnx.Param | None, num_inputs: int = 1
    ) -> Array:
        y = linear(x.astype(self.dtype), weight[...].astype(self.dtype), num_inputs=num_inputs)
        if bias is None:
            return y
        return y + jnp.broadcast_to(bias[...].astype(self.dtype), y.shape)

    def project_output(self, x_BTNH: Array) -> Array:
        return self._project(x_BTNH, self.out, self.out_bias, num_inputs=2)


def cache_spec(attention: Projections, batch: int, dtype: DTypeLike | None) -> KVCache | RingCache:
    """How an empty cache of `init_cache` is split on explicit axes: rows, and heads."""
    mesh = explicit_mesh((attention,), {})
    heads, *_ = spec(attention.key[...])
    split = partition(batch_axes(mesh, batch), heads, None, None)
    dtype = attention.cache_dtype if dtype is None else check_cache_dtype("dtype", dtype)
    key = held_spec(split, dtype)
    cache_type = KVCache if attention.window is None else RingCache
    return cache_type(key, key, partition(split[0]))


def cross_cache_spec(attention: Projections, batch: Any, source: Any) -> CrossCache:
    """How a memory's keys and values are split on explicit axes: as the memory, and by heads."""
    heads, *_ = spec(attention.key[...])
    key = held_spec(partition(batch, heads, source, None), attention.cache_dtype)
    return CrossCache(key, key, partition(batch, source))
