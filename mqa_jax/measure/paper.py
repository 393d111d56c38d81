"""The paper's table 2 beside a run's rows. Knows no JAX."""

import dataclasses
import itertools
from collections.abc import Sequence

from mqa_jax.measure.cost import KEYS, Cost

# Shazeer 2019, table 2: TPUv2-microseconds per output token, of the encoder and of the decoder.
PAPER = {
    "greedy": {
        "multi_head": (1.7, 46.0),
        "multi_query": (1.5, 3.8),
        "multi_head_local": (1.7, 23.0),
        "multi_query_local": (1.5, 3.3),
    },
    "beam": {
        "multi_head": (2.0, 203.0),
        "multi_query": (1.6, 32.0),
        "multi_head_local": (1.9, 47.0),
        "multi_query_local": (1.6, 16.0),
    },
}


@dataclasses.dataclass(frozen=True)
class Compared:
    """A part of a variant's cost beside the paper's.

    Attributes:
      cost: the row.
      part: `encoder` or `decoder`.
      us_per_token: microseconds per output token in this run.
      times_cheaper: how many of that multi_head takes at the same size in this run.
      paper_us_per_token: the paper's TPUv2-microseconds per output token (Shazeer 2019, table 2).
      paper_times_cheaper: how many of that the paper's multi_head takes.
    """

    cost: Cost
    part: str
    us_per_token: float
    times_cheaper: float
    paper_us_per_token: float
    paper_times_cheaper: float


def compare_with_paper(costs: Sequence[Cost]) -> list[Compared]:
    """Encoder and decoder of each row that the paper's table 2 has beside a multi_head of its size.

    Raises:
      ValueError: there is none.
    """
    heads = {_size(c): c for c in costs if c.variant == "multi_head"}
    compared = []
    for cost, (i, part) in itertools.product(costs, enumerate(("encoder", "decoder"))):
        paper, head = PAPER[cost.search], heads.get(_size(cost))
        if cost.encode_us_per_token is None or cost.variant not in paper or head is None:
            continue
        name = ("encode_us_per_token", "step_us_per_token")[i]
        ours, theirs = getattr(cost, name), paper[cost.variant][i]
        compared.append(
            Compared(
                cost=cost,
                part=part,
                us_per_token=ours,
                times_cheaper=getattr(head, name) / ours,
                paper_us_per_token=theirs,
                paper_times_cheaper=paper["multi_head"][i] / theirs,
            )
        )
    if not compared:
        raise ValueError(
            f"nothing to compare: the paper's table 2 has {', '.join(PAPER['greedy'])}, all "
            "translating, and ratios need multi_head"
        )
    return compared


def _size(cost: Cost) -> tuple:
    return tuple(getattr(cost, key) for key in KEYS)
