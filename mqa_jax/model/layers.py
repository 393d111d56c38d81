"""What stands around attention in a Transformer: feed-forward, embeddings, softmax.

Array letters: B batch, T length, D model dim, F feed-forward dim, V vocabulary, P positions
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from mqa_jax.core.arrays import as_floats, as_ids, check_dtype
from mqa_jax.core.checks import check_integer
from mqa_jax.core.dropout import Dropout
from mqa_jax.core.explicit import automatic, partition, spec
from mqa_jax.core.linear import linear
from mqa_jax.core.quantized import looked_up
from mqa_jax.core.sharding import param, zeros

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


class FeedForward(nnx.Module):
    """Two products with an activation between them: `act(x @ wi.T) @ wo.T`.

    Args:
      d_model: `D`.
      d_ff: `F`.
      activation: one of `ACTIVATIONS`; "gelu" is the exact one, by the error function.
      gated: a third product, `(act(x @ gate.T) * (x @ wi.T)) @ wo.T` (Shazeer 2020).
      use_bias: each product has a bias, `wi_bias`, `gate_bias` and `wo_bias`.
      dropout_rate: before the last product.

    Raises:
      ValueError: a size below 1, an unknown activation, a rate outside `[0, 1)`, or a dtype that is
        no float.
    """

    PRODUCTS: ClassVar = {"wi": 1, "wo": 1, "gate": 1}

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "relu",
        gated: bool = False,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        d_model, d_ff = check_integer("d_model", d_model), check_integer("d_ff", d_ff)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        param_dtype = check_dtype("param_dtype", param_dtype)
        weight = functools.partial(param, rngs=rngs, dtype=param_dtype)
        self.wi = weight("FD", (d_ff, d_model), fan_in=d_model)
        self.wo = weight("DF", (d_model, d_ff), fan_in=d_ff)
        self.gate = weight("FD", (d_ff, d_model), fan_in=d_model) if gated else None
        self.wi_bias = zeros("F", (d_ff,), dtype=param_dtype) if use_bias else None
        self.gate_bias = zeros("F", (d_ff,), dtype=param_dtype) if use_bias and gated else None
        self.wo_bias = zeros("D", (d_model,), dtype=param_dtype) if use_bias else None
        self.dropout = Dropout(dropout_rate)
        self.dtype = check_dtype("dtype", dtype)

    @automatic(lambda x_BTD, **_: spec(x_BTD))
    def __call__(self, x_BTD: ArrayLike, *, rngs: nnx.Rngs | None = None) -> Array:
        """`[..., D]` to `[..., D]`; dropout where `rngs` is given."""
        x_BTD = as_floats("x_BTD", x_BTD, self.wi.shape[1]).astype(self.dtype)
        act, y_BTF = ACTIVATIONS[self.activation], self._product(x_BTD, self.wi, self.wi_bias)
        if self.gate is None:
            y_BTF = act(y_BTF)
        else:
            y_BTF *= act(self._product(x_BTD, self.gate, self.gate_bias))
        return self._product(self.dropout(y_BTF, rngs=rngs), self.wo, self.wo_bias)

    def _product(self, x: Array, weight: nnx.Param, bias: nnx.Param | None) -> Array:
        y = linear(x, weight[...].astype(self.dtype))
        return y if bias is None else y + jnp.broadcast_to(bias[...].astype(self.dtype), y.shape)


class Embedding(nnx.Module):
    """A table of vectors, looked up by id; and, for tied weights, the softmax product with it.

    The vectors have unit variance; `logits` by default divides by `sqrt(D)` to make up for it, as
    the paper's code base does for weights shared between embedding and softmax.

    Args:
      num_embeddings: rows of the table.
      d_model: `D`.
      axes: the letters of the table's axes, "VD" for tokens and "PD" for positions.
    """

    PRODUCTS: ClassVar = {"table": 1}

    def __init__(
        self,
        num_embeddings: int,
        d_model: int,
        *,
        axes: str = "VD",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = check_integer("num_embeddings", num_embeddings), check_integer("d_model", d_model)
        dtype, param_dtype = check_dtype("dtype", dtype), check_dtype("param_dtype", param_dtype)
        self.table = param(axes, shape, fan_in=1, rngs=rngs, dtype=param_dtype)
        self.dtype = dtype

    @automatic(lambda ids, **_: partition(*spec(ids), None))
    def __call__(self, ids: ArrayLike) -> Array:
        """`[...]` ids to `[..., D]` vectors; an id outside the table, a negative one too, to NaN.

        Under `jax.jit` no error can be raised; NaN cannot be overlooked, a clamped id can.
        """
        ids, num_embeddings = as_ids("ids", ids), self.table.shape[0]
        # `mode="fill"` alone would count a negative id from the end, and wrap a wide one around.
        ids = jnp.where((ids < 0) | (ids > num_embeddings), num_embeddings, ids)
        ids = ids.astype(jnp.int32)
        # Cast behind the lookup, so that the gradients of a token that occurs a thousand times are
        # summed in the table's own precision (and, on a GPU, without bfloat16's slow atomics).
        table = self.table[...]
        is_narrow = isinstance(table, Array) and jnp.finfo(table.dtype).bits < 32
        return (_lookup_narrow if is_narrow else looked_up)(table, ids).astype(self.dtype)

    @automatic(lambda self, x_BTD, **_: logits_spec(self.table, *spec(x_BTD)[:-1]))
    def logits(self, x_BTD: ArrayLike, *, scale: float | None = None) -> Array:
        """`[..., D]` times `scale`, `D ** -0.5` when None, to `[..., V]`, float32."""
        scale = self.table.shape[1] ** -0.5 if scale is None else scale
        return _logits(x_BTD, self.table, scale, self.dtype)


@jax.custom_vjp
def _lookup_narrow(table_VD: Array, ids: Array) -> Array:
    """As `looked_up`, of a table in bfloat16, say; its gradient is summed in float32 anyway."""
    return looked_up(table_VD, ids)


def _lookup_forward(table_VD: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return looked_up(table_VD, ids), (table_VD, ids)


def _lookup_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table_VD, ids = residuals
    zeros_VD = jnp.zeros(table_VD.shape, jnp.float32)
    sums_VD = zeros_VD.at[ids].add(gradient.astype(jnp.float32), mode="drop")
    return sums_VD.astype(table_VD.dtype), None


_lookup_narrow.defvjp(_lookup_forward, _lookup_backward)


class Softmax(nnx.Module):
    """The product that ends a model whose softmax weights are its own: `[V, D]`."""

    PRODUCTS: ClassVar = {"kernel": 1}

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shape = check_integer("vocab_size", vocab_size), check_integer("d_model", d_model)
        dtype, param_dtype = check_dtype("dtype", dtype), check_dtype("param_dtype", param_dtype)
        self.kernel = param("VD", shape, fan_in=shape[1], rngs=rngs, dtype=param_dtype)
        self.dtype = dtype

    @automatic(lambda self, x_BTD, **_: logits_spec(self.kernel, *spec(x_BTD)[:-1]))
    def logits(self, x_BTD: ArrayLike, *, scale: float | None = None) -> Array:
        """`[..., D]`, times `scale` where it is given, to `[..., V]`, float32."""
        return _logits(x_BTD, self.kernel, 1.0 if scale is None else scale, self.dtype)


def _logits(x_BTD: ArrayLike, weight_VD: nnx.Param, scale: float, dtype: DTypeLike) -> Array:
    x_BTD = as_floats("x_BTD", x_BTD, weight_VD.shape[1]).astype(dtype)
    if scale != 1:
        x_BTD *= jnp.asarray(scale, dtype)
    return linear(x_BTD, weight_VD[...].astype(dtype), output_dtype=jnp.float32)


def logits_spec(weight_VD: nnx.Param, *leading: Any) -> PartitionSpec:
    """How logits are split on explicit axes: as their tokens, and the vocabulary as its weight."""
    return partition(*leading, spec(weight_VD[...])[0])
