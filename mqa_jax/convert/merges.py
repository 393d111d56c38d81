"""How the key/value heads of a group become one.

A merge is a function of `heads [M, b, D]`, the `M` heads of a group. It returns `merged [b, D]` and
`turns [M, b, b]`, such that head `m` is about `turns[m] @ merged`. Who asked head `m` then asks the
merged one, with queries turned by the conjugate transpose; what was made of its values is made of
the turned ones. Heads are complex where two dimensions may only be turned together: by an angle
and a length, as RoPE turns them.

Array letters: M heads of a group   b dimensions of a head that may be mixed   D inputs
"""

from collections.abc import Callable

import numpy as np

Merged = tuple[np.ndarray, np.ndarray]
Merge = Callable[[np.ndarray], Merged]

ROUNDS = 32  # of `aligned`; it comes to rest within a few.


def mean(heads_MbD: np.ndarray) -> Merged:
    """The mean of the heads (Ainslie et al. 2023, section 2.1)."""
    return heads_MbD.mean(axis=0), _unturned(heads_MbD)


def first(heads_MbD: np.ndarray) -> Merged:
    """The first head alone (Ainslie et al. 2023, section 3.3)."""
    return heads_MbD[0], _unturned(heads_MbD)


class Random:
    """A head drawn anew, as large as theirs are (Ainslie et al. 2023, section 3.3).

    Args:
      seed: of the draws; no two calls draw the same.
    """

    def __init__(self, seed: int = 0):
        self._rng = np.random.default_rng(seed)

    def __call__(self, heads_MbD: np.ndarray) -> Merged:
        drawn = self._rng.normal(size=heads_MbD.shape[1:]).astype(heads_MbD.dtype)
        if np.iscomplexobj(heads_MbD):
            drawn = (drawn + 1j * self._rng.normal(size=drawn.shape)) / np.sqrt(2)
        return drawn * np.sqrt(np.mean(np.abs(heads_MbD) ** 2)), _unturned(heads_MbD)


def aligned(heads_MbD: np.ndarray) -> Merged:
    """The mean of heads that are turned towards it first (orthogonal Procrustes; Schoenemann 1966,
    and Gower 1975 for more than two).

    A turn alone, which a head's queries make as well, changes nothing of what the model computes.
    """
    merged = heads_MbD[np.argmax(np.sum(np.abs(heads_MbD) ** 2, axis=(1, 2)))]
    for _ in range(ROUNDS):
        products_Mbb = heads_MbD @ merged.conj().T
        left, _, right = np.linalg.svd(products_Mbb)
        turns_Mbb = left @ right
        merged = np.mean(turns_Mbb.conj().swapaxes(1, 2) @ heads_MbD, axis=0)
    return merged, turns_Mbb


def truncated(heads_MbD: np.ndarray) -> Merged:
    """What of all the heads' weights, one behind the other, `b` dimensions can hold at most (Eckart
    and Young 1936: the singular value decomposition, cut off).
    """
    count, size, inputs = heads_MbD.shape
    stacked = heads_MbD.reshape(count * size, inputs)
    # Values in ascending order.
    _, vectors = np.linalg.eigh(stacked @ stacked.conj().T)
    kept = vectors[:, ::-1][:, :size]
    return kept.conj().T @ stacked, kept.reshape(count, size, size)


DEFAULT = "truncated"  # Of the command; `heads` has it, too: see docs/guides/converting.md.

MERGES: dict[str, Callable[[], Merge]] = {
    "mean": lambda: mean,
    "first": lambda: first,
    "random": Random,
    "aligned": lambda: aligned,
    "truncated": lambda: truncated,
}


def _unturned(heads_MbD: np.ndarray) -> np.ndarray:
    count, size, _ = heads_MbD.shape
    return np.broadcast_to(np.eye(size, dtype=heads_MbD.dtype), (count, size, size))
