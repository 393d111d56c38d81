"""Dropout as the paper's code base has it, for attention weights and for layers."""

from flax import nnx


class Dropout(nnx.Dropout):
    """One mask for all positions of a row: `[..., T, D]` arrays lose the same features at each `T`.

    So it is in the paper's code base, for layers, the ReLU and attention weights `[..., T, S]`
    alike. There is next to nothing to draw; a mask for each position can cost a fifth of a step.
    """

    def __init__(self, rate: float):
        super().__init__(rate, broadcast_dims=(-2,))
