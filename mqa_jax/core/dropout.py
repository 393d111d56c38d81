"""Dropout as the paper's code base has it, for attention weights and for layers."""

from flax import nnx
from flax.nnx.bridge.wrappers import current_linen_module
from jax import Array

from mqa_jax.core.checks import check_number


class Dropout(nnx.Dropout):
    """One mask for all positions of a row: `[..., T, D]` arrays lose the same features at each `T`.

    So it is in the paper's code base, for layers, the ReLU and attention weights `[..., T, S]`
    alike. There is next to nothing to draw; a mask for each position can cost a fifth of a step.

    It drops where `rngs` are given (stream `dropout`), or in a Linen module that is applied with an
    rng named `dropout`. A model's `eval()` ends it, whatever is given; behind `train()` it must be
    given.

    Raises:
      ValueError: a rate that is no number, or outside `[0, 1)`.
    """

    def __init__(self, rate: float):
        rate = check_number("dropout_rate", rate, least=0, below=1)
        super().__init__(rate, broadcast_dims=(-2,))
        self.deterministic = None  # Neither `train()` nor `eval()` was called.

    def drops_with(self, rngs: nnx.Rngs | None) -> nnx.Rngs | None:
        """The rngs to draw with; None where nothing is dropped.

        Raises:
          ValueError: `train()` was called, and there are none.
        """
        if self.rate == 0 or self.deterministic:
            return None
        linen = current_linen_module()
        if rngs is None and linen is not None and linen.has_rng("dropout"):
            return nnx.Rngs(dropout=linen.make_rng("dropout"))
        if rngs is None and self.deterministic is not None:
            raise ValueError(
                f"train() was called, but no rngs are given to drop {self.rate:g} with: call the "
                "model with rngs=nnx.Rngs(dropout=seed), or eval() it"
            )
        return rngs

    # Whether it drops follows from what `drops_with` says, not from an argument.
    def __call__(  # type: ignore[override]
        self, x: Array, *, rngs: nnx.Rngs | None = None
    ) -> Array:
        """`x`, with some features zero and the others larger where it drops."""
        rngs = self.drops_with(rngs)
        return x if rngs is None else super().__call__(x, deterministic=False, rngs=rngs)
