"""How attention tells positions apart: rotation of queries and keys, and biases by distance.

A rotation is a function of `x [B, T, heads, H]` and its positions `[B, T]`, such as `Rope()`, and
is an option of `Attention`: queries and keys are rotated, keys before they are cached. A bias is a
function of the positions of queries `[B, T]` and of keys `[B, S]`, such as a `RelativeBias`, that
returns what is added to the logits, `[B, N, T, S]`, in which `B` and `N` may be 1. One's own
functions are as good as these.

Array letters:
  B batch   T query length   S key/value length   N query heads   H head dim
"""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from mqa_jax.core.arrays import check_dtype
from mqa_jax.core.checks import check_integer, check_number
from mqa_jax.core.sharding import param

Rotation = Callable[[Array, Array], Array]
BiasFunction = Callable[[Array, Array], Array]

SCALINGS = ("default", "linear", "llama3")
FARTHEST = 2**20  # that a `RelativeBias` tells distances apart: it has a table of them.


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) of whole heads, in halves.

    `x = (a, b)` turns into `(a cos - b sin, b cos + a sin)`, by an angle for each `i` of a half:
    `position * theta ** (-2 i / H)`.

    Attributes:
      theta: the base of the frequencies.
      scaling: how a longer context is reached: "default", not at all; "linear", every frequency
        over `factor`; "llama3", only the low ones, with a ramp between (Llama 3.1).
      factor: of the scaling.
      low_freq_factor: "llama3": below so many turns within `original_max_length` a frequency is
        divided whole.
      high_freq_factor: "llama3": above so many turns it is kept.
      original_max_length: "llama3": the length that the model was first trained for.

    Raises:
      ValueError: a number out of range, an unknown scaling, a factor without a scaling, or a
        "llama3" that lacks its length.
    """

    theta: float = 10_000.0
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what no rotation can have."""
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            check_number(f"rope {name}", getattr(self, name), above=0)
        if self.scaling not in SCALINGS:
            raise ValueError(f"rope scaling {self.scaling!r} is not one of {', '.join(SCALINGS)}")
        if self.scaling == "default" and self.factor != 1:
            raise ValueError(f"rope factor={self.factor} needs a scaling, such as 'linear'")
        if self.scaling == "llama3":
            if self.original_max_length is None:
                raise ValueError("rope scaling 'llama3' needs original_max_length")
            check_integer("rope original_max_length", self.original_max_length)
            if self.low_freq_factor >= self.high_freq_factor:
                raise ValueError(
                    f"rope low_freq_factor={self.low_freq_factor} must be below "
                    f"high_freq_factor={self.high_freq_factor}"
                )

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a position, `[H / 2]` float64.

        Raises:
          ValueError: `head_dim` is odd.
        """
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} is odd: rope turns halves of a head")
        frequency = self.theta ** -(np.arange(0, head_dim, 2) / head_dim)
        if self.scaling == "linear":
            return frequency / self.factor
        if self.scaling == "llama3" and self.original_max_length is not None:
            turns = self.original_max_length * frequency / (2 * math.pi)
            ramp = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = np.clip(ramp, 0, 1)
            return frequency * (keep + (1 - keep) / self.factor)
        return frequency

    def __call__(self, x_BTNH: Array, positions_BT: Array) -> Array:
        """`x` rotated, in its dtype; angles and products are taken in float32."""
        frequency = jnp.asarray(self.frequencies(x_BTNH.shape[-1]), jnp.float32)
        angle_BT1h = positions_BT.astype(jnp.float32)[..., None, None] * frequency[None, None, None]
        cos, sin = jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)
        a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


class RelativeBias(nnx.Module):
    """T5's bias (Raffel et al. 2020, section 2.1): a number a head for each range of distances.

    Distances up to half of the buckets have one each, those up to `distance` share the others, in
    ranges that grow like a logarithm, and the last one takes all that are farther.

    Args:
      num_heads: `N`.
      num_buckets: rows of the table.
      distance: from there on all are alike; at most `FARTHEST`.
      bidirectional: half of the buckets are for keys behind the query, as in an encoder; else keys
        behind it count as the query's own position.

    Raises:
      ValueError: numbers out of range: `num_buckets` below 2 (4 and even if bidirectional), or a
        `distance` that leaves no range for the logarithm.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        distance: int = 128,
        bidirectional: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        num_heads = check_integer("num_heads", num_heads)
        self.bidirectional = bidirectional
        self.side = check_integer("num_buckets", num_buckets) // (2 if bidirectional else 1)
        if self.side < 2 or (bidirectional and num_buckets % 2):
            raise ValueError(
                f"num_buckets={num_buckets} must be at least 2, and for both directions at least 4 "
                "and even"
            )
        self.distance = check_integer("distance", distance, most=FARTHEST)
        if distance <= self.side // 2:
            raise ValueError(
                f"distance={distance} must be above {self.side // 2}, up to where each distance "
                "has a bucket of its own"
            )
        self.table = param(
            "PN",
            (num_buckets, num_heads),
            fan_in=num_heads,
            rngs=rngs,
            dtype=check_dtype("param_dtype", param_dtype),
        )

    def buckets(self, offset: Array) -> Array:
        """The row of the table for each `key position - query position`."""
        exact = self.side // 2
        # A table, since a device may come out on the other side of a range's border. Where the
        # logarithm is whole there, rounding decides: that of float32, as models were trained with.
        far = np.arange(self.distance + 1)
        ratio = np.maximum(far, 1).astype(np.float32) / np.float32(exact)
        share = np.log(ratio, dtype=np.float64).astype(np.float32)
        share /= np.float32(math.log(self.distance / exact))
        large = exact + np.floor(share * np.float32(self.side - exact))
        large = np.minimum(large, self.side - 1)
        bucket_of = jnp.asarray(np.where(far < exact, far, large), jnp.int32)
        distance = jnp.abs(offset) if self.bidirectional else jnp.maximum(-offset, 0)
        bucket = bucket_of[jnp.minimum(distance, self.distance)]
        if self.bidirectional:
            bucket = jnp.where(offset > 0, bucket + self.side, bucket)
        return bucket

    def __call__(self, query_positions_BT: Array, key_positions_BS: Array) -> Array:
        """`[B, N, T, S]` float32."""
        offset_BTS = key_positions_BS[:, None, :] - query_positions_BT[:, :, None]
        bias_BTSN = self.table[...][self.buckets(offset_BTS)]
        return jnp.moveaxis(bias_BTSN, 3, 1).astype(jnp.float32)


def sinusoids(length: int, d_model: int) -> np.ndarray:
    """The table of Vaswani et al. 2017, section 3.5, sines first: `[length, D]` float32."""
    half = (d_model + 1) // 2
    frequency = 10_000.0 ** -(2 * np.arange(half) / d_model)
    angle = np.arange(length)[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle[:, : d_model - half])], axis=1).astype(
        np.float32
    )
