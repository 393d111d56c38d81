"""Norms over the last axis, computed in float32.

Array letters: D features
"""

from typing import cast

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from mqa_jax.core.arrays import as_floats, check_dtype
from mqa_jax.core.checks import check_integer, check_number
from mqa_jax.core.explicit import automatic, spec


class RMSNorm(nnx.RMSNorm):
    """The norm of the paper's code base: a scale, no mean, no bias (Zhang and Sennrich 2019).

    Args:
      d_model: `D`.
      epsilon: what is added to the variance.
      axis: the letter of the scale's axis.

    Raises:
      ValueError: a size below 1, an epsilon not above 0, or a dtype that is no float.
    """

    def __init__(
        self,
        d_model: int,
        *,
        epsilon: float = 1e-6,
        axis: str = "D",
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            check_integer("d_model", d_model),
            epsilon=check_number("epsilon", epsilon, above=0),
            dtype=jnp.float32,
            param_dtype=check_dtype("param_dtype", param_dtype),
            scale_metadata={"axes": axis},
            rngs=rngs,
        )
        self.output_dtype = check_dtype("dtype", dtype)

    @automatic(lambda x_BTD, **_: spec(x_BTD))
    def __call__(self, x_BTD: ArrayLike) -> Array:  # type: ignore[override]  # Without a mask.
        x_BTD = as_floats("x_BTD", x_BTD, self.num_features).astype(jnp.float32)
        mean_BT1 = jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True)
        # The scale is multiplied in last, and not into the factor of the row as flax does: XLA on a
        # GPU then has one kernel for a norm, where it makes two.
        y_BTD = x_BTD * lax.rsqrt(mean_BT1 + self.epsilon)
        scale_D = cast(nnx.Param, self.scale)[...].astype(jnp.float32)
        y_BTD *= jnp.broadcast_to(scale_D, y_BTD.shape)
        return y_BTD.astype(self.output_dtype)


class LayerNorm(nnx.LayerNorm):
    """As `RMSNorm`, behind taking the mean away, and with a bias (Ba et al. 2016)."""

    def __init__(
        self,
        d_model: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            check_integer("d_model", d_model),
            epsilon=check_number("epsilon", epsilon, above=0),
            dtype=jnp.float32,
            param_dtype=check_dtype("param_dtype", param_dtype),
            # The mean of the squares less the square of the mean would lose what is small.
            use_fast_variance=False,
            scale_metadata={"axes": "D"},
            bias_metadata={"axes": "D"},
            rngs=rngs,
        )
        self.output_dtype = check_dtype("dtype", dtype)

    @automatic(lambda x_BTD, **_: spec(x_BTD))
    def __call__(self, x_BTD: ArrayLike) -> Array:  # type: ignore[override]  # Without a mask.
        x_BTD = as_floats("x_BTD", x_BTD, self.num_features)
        return super().__call__(x_BTD.astype(jnp.float32)).astype(self.output_dtype)


Norm = RMSNorm | LayerNorm

NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
