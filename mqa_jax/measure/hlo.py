"""The text of a compiled program (XLA's HLO): its collectives, and the compiler's estimate."""

import collections
import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Collectives:
    """The collective operations of one kind in a program.

    Attributes:
      kind: `all-reduce`, `all-gather`, ...
      group_size: how many devices take part in one.
      in_loop: whether they are in the body of a loop, and so run more often than they are counted.
      count: how many.
      num_bytes: of all of them together, on a device. What counts is the larger side: what an
        all-gather ends with, what a reduce-scatter begins with.
    """

    kind: str
    group_size: int
    in_loop: bool
    count: int
    num_bytes: int


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
_COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>.+?) (?P<kind>all-reduce|all-gather|reduce-scatter"
    r"|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*)\[([\d,]*)\]")


class Program:
    """The text of a compiled program (XLA's HLO), read line by line.

    Attributes:
      instructions: pairs of the computation that one is in and its line.
      looped: the computations that are part of a loop's body or condition.
      fused: the computations that are inside of a fusion.
    """

    def __init__(self, hlo: str):
        self.instructions: list[tuple[str, str]] = []
        self.looped: set[str] = set()
        self.fused: set[str] = set()
        called: dict[str, list[str]] = collections.defaultdict(list)
        waiting: list[str] = []
        computation = ""
        for line in hlo.splitlines():
            if match := _COMPUTATION.match(line):
                computation = match[1]
                continue
            self.instructions.append((computation, line))
            for how, names in _CALLED.findall(line):
                names = re.findall(r"[\w.-]+", names)
                called[computation] += names
                if how in ("body", "condition"):
                    waiting += names
                if " fusion(" in line:
                    self.fused.update(names)
        while waiting:
            if (name := waiting.pop()) not in self.looped:
                self.looped.add(name)
                waiting += called[name]

    def collectives(self, device_count: int) -> list[Collectives]:
        """The collectives of a program for so many devices, the most bytes first."""
        sizes: dict[tuple[str, int, bool], list[int]] = collections.defaultdict(list)
        seen: set[str] = set()
        for computation, line in self.instructions:
            if not (match := _COLLECTIVE.match(line)):
                continue
            # A collective that is spread over several fusions, to overlap with what they compute,
            # is written in each of them; its channel is the same.
            if channel := re.search(r"channel_id=(\d+)", line):
                if channel[1] in seen:
                    continue
                seen.add(channel[1])
            kind, group_size = match["kind"], _group_size(line, device_count)
            num_bytes = sum(map(_nbytes, _ARRAY.findall(match["type"])))
            if match["start"] and kind != "all-reduce":
                # The type has the operands as well as the results.
                ratio = group_size if kind in ("all-gather", "reduce-scatter") else 1
                num_bytes = num_bytes * ratio // (ratio + 1)
            elif kind == "reduce-scatter":
                num_bytes *= group_size
            if computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # As a fusion of an all-reduce with a slice, of one kernel.
            sizes[kind, group_size, computation in self.looped].append(num_bytes)
        found = [Collectives(*key, len(each), sum(each)) for key, each in sizes.items()]
        return sorted(found, key=lambda c: -c.num_bytes)

    def estimated_seconds(self, optimal_seconds: float) -> float | None:
        """XLA's cost model of the whole program, without custom calls; None where it has none.

        Args:
          optimal_seconds: what `cost_analysis` says, in which every custom call counts -1; as it
            is float32, some microseconds of it are noise.
        """
        calls = [name for name, line in self.instructions if " custom-call(" in line]
        if any(name in self.looped for name in calls):
            return None
        seconds = optimal_seconds + sum(name not in self.fused for name in calls)
        return seconds if seconds > 0 else None


def _nbytes(array: tuple[str, str]) -> int:
    name, shape = array
    bits = 8 if name == "pred" else int(re.findall(r"\d+", name)[0])
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8


def _group_size(line: str, device_count: int) -> int:
    """Of `{{0,1},{2,3}}`, `[2,2]<=[4]` and `mesh['a'=2,'b'=2] {'a'}`: 2."""
    if "source_target_pairs=" in line:
        return 2
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        # A part of an axis is written 'axis':(1)2, the size behind the brackets.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return device_count
