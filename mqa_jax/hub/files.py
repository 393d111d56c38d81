"""A Hugging Face directory, opened: its JSON files, and tensors that are read one by one.

Nothing of it is trusted. Names, sizes and offsets are checked before a file is mapped, and a
pickle, which is a program, is never read.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax  # noqa: F401  (by it numpy knows bfloat16)
import numpy as np
import safetensors

from mqa_jax.core.paths import local_path, read_json

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The longest header of a file: the format's own limit, of some hundred thousand tensors.
MAX_HEADER_BYTES = 100_000_000

# Bits of an element. What is not in `FLOATS` is there to be told apart from damage.
BITS = {
    **dict(F64=64, F32=32, F16=16, BF16=16, C64=64, F8_E5M2=8, F8_E4M3=8, F8_E8M0=8, F4=4),
    **dict(F8_E4M3FNUZ=8, F8_E5M2FNUZ=8, F6_E2M3=6, F6_E3M2=6, BOOL=8),
    **{f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)},
}
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Of the values of our own quantized weights.
EIGHT_BITS = {"int8": "I8", "float8_e4m3fn": "F8_E4M3"}

_PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")
_CONVERT = (
    'python -c \'import safetensors.torch, torch; w = torch.load("pytorch_model.bin", '
    "weights_only=True); safetensors.torch.save_file({k: v.clone().contiguous() for k, v in "
    'w.items()}, "model.safetensors")\''
)
# Elements that are looked at together, so that they stay in the processor's cache.
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor is, and what it is.

    Attributes:
      file: the safetensors file.
      dtype: as the file says it, of `BITS`.
      shape: its axes.
      start: the byte of the file that it begins at.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} in {self.file}"


class Directory:
    """A directory with `config.json` and safetensors.

    Attributes:
      path: the directory.
      config: `config.json`.
      generation: `generation_config.json`; None where there is none.

    Raises:
      ValueError: there is no such directory, or no `config.json` in it, or a file is no JSON.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = local_path("the directory", path)
        if self.path.is_file():
            raise ValueError(f"{self.path} is a file: give the directory that it is in")
        if not self.path.is_dir():
            raise ValueError(
                f"there is no directory {self.path}: download the model first, as with "
                f"`hf download NAME --local-dir {self.path}`"
            )
        if not (self.path / CONFIG).is_file():
            raise ValueError(
                f"{self.path} has no {CONFIG}, which says what model it is: give the directory of "
                "a model that was saved or downloaded whole"
            )
        self.config = json_object(self.path / CONFIG)
        generation = self.path / GENERATION
        self.generation = json_object(generation) if generation.is_file() else None
        self._opened: dict[Path, Any] = {}

    @property
    def has_weights(self) -> bool:
        """Whether there are tensors that can be read, damaged perhaps."""
        return any((self.path / name).is_file() for name in (WEIGHTS, INDEX))

    @functools.cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors by name, of one file or of all shards; only headers have been read.

        Raises:
          ValueError: there are none, or only pickles; or a file is damaged, or disagrees with the
            index.
        """
        if (self.path / WEIGHTS).is_file():
            return read_header(self.path / WEIGHTS)
        if (self.path / INDEX).is_file():
            return _read_index(self.path / INDEX)
        pickles = sorted({p.name for pattern in _PICKLES for p in self.path.glob(pattern)})
        if pickles:
            raise ValueError(
                f"{self.path} has its weights as {', '.join(pickles)} alone. A pickle can run any "
                f"program when it is read, so none is: make {WEIGHTS} of it where torch is "
                f"installed, in that directory: {_CONVERT}"
            )
        raise ValueError(f"{self.path} has no weights: neither {WEIGHTS} nor {INDEX} is there")

    def floats(self, name: str) -> Tensor:
        """A tensor that is of numbers that weights are made of.

        Raises:
          ValueError: it is not.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{name} is {tensor}: integers and eight bits are of quantized checkpoints, which "
                "are not read: take one with weights in bfloat16, float16 or float32"
            )
        return tensor

    def read(self, name: str) -> np.ndarray:
        """A tensor, in the dtype of the file.

        Raises:
          ValueError: it is not of floats, or holds NaN or infinity.
        """
        file = self.floats(name).file
        array = self._open(file).get_tensor(name)
        if not is_finite(array):
            raise ValueError(
                f"{name} in {file} holds NaN or infinity: the file is damaged, or the training "
                "that wrote it had diverged"
            )
        return array

    def read_eight_bits(self, name: str, dtype: np.dtype) -> np.ndarray:
        """A tensor of `EIGHT_BITS`.

        Raises:
          ValueError: it is of something else, or holds NaN.
        """
        tensor = self.tensors[name]
        if tensor.dtype != EIGHT_BITS[dtype.name]:
            raise ValueError(f"{name} is {tensor}, and the scheme is of {dtype}")
        # The library knows no float8 without PyTorch.
        words = np.memmap(tensor.file, np.uint8, "r", tensor.start, tensor.shape)
        array = np.asarray(words).view(dtype)
        if not is_finite(array):
            raise ValueError(f"{name} in {tensor.file} holds NaN: the file is damaged")
        return array

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors are the same; of large ones rarely more than a part is read."""
        a, b = self.floats(name), self.floats(other)
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if not a.shape:
            return bool(self.read(name) == self.read(other))
        slices = [self._open(t.file).get_slice(n) for n, t in ((name, a), (other, b))]
        step = max(1, _CHUNK // max(1, math.prod(a.shape[1:])))
        starts = range(0, a.shape[0], step)
        spans = (slice(start, min(start + step, a.shape[0])) for start in starts)
        return all(np.array_equal(*(part[span] for part in slices)) for span in spans)

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            try:
                self._opened[file] = safetensors.safe_open(file, framework="np")
            except safetensors.SafetensorError as error:
                raise _damaged(file, str(error)) from None
        return self._opened[file]


def json_object(path: Path) -> dict[str, Any]:
    """As `read_json`, of a file that may have been made to do harm."""
    try:
        return read_json(path)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read") from None


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite: those have all bits of the exponent set."""
    if array.dtype.kind == "i":
        return True
    size = array.dtype.itemsize
    unsigned = np.dtype(f"u{size}").type
    infinity = np.array(np.inf, array.dtype).view(unsigned)
    magnitude = unsigned((1 << (8 * size - 1)) - 1)
    flat = array.reshape(-1).view(unsigned)
    return all(
        (flat[start : start + _CHUNK] & magnitude).max() < infinity
        for start in range(0, flat.size, _CHUNK)
    )


def _read_index(path: Path) -> dict[str, Tensor]:
    """The tensors of all shards, which are exactly those that the index names."""
    places = json_object(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{path} has no weight_map, which says what tensor is in what file")
    found: dict[str, Tensor] = {}
    for shard in dict.fromkeys(map(str, places.values())):
        is_name = len(shard) < 200 and not set(shard) & set("/\\:\0")
        if not is_name or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{path} names the file {shard!r:.99}: a shard is a .safetensors file beside it"
            )
        file = path.with_name(shard)
        if not file.is_file():
            raise ValueError(f"{path} names {shard}, which is missing: download it again")
        for name, tensor in read_header(file).items():
            if places.get(name) != shard:
                where = f"in {places[name]}" if name in places else "nowhere"
                raise ValueError(f"{name} is in {file}, but by {path.name} it is {where}")
            found[name] = tensor
    if missing := [name for name in places if name not in found]:
        file = path.with_name(places[missing[0]])
        raise ValueError(f"{missing[0]} is not in {file}, where {path.name} has it")
    return found


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, whose data are all there, without a hole or an overlap.

    Raises:
      ValueError: the file is damaged, or another format.
    """

    damaged = functools.partial(_damaged, path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise damaged(f"it has {size} bytes, and its first 8 are the length of its header")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise damaged(
                f"its header has {length} bytes, it says, of {size} in all "
                f"({MAX_HEADER_BYTES} is the most)"
            )
        header = file.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise damaged(f"its header is no JSON: {error}") from None
    if not isinstance(entries, dict):
        raise damaged("its header is no JSON object")
    entries.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in entries.items():
        try:
            tensors[name], span = _entry(path, entry, 8 + length)
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(f"{name}: {error!r}") from None
        spans.append((*span, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise damaged(f"{name} begins at byte {start}, not {end}, where the one before it ends")
        end = stop
    if end != size - 8 - length:
        raise damaged(f"its tensors have {end} bytes, but {size - 8 - length} are there")
    return tensors


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged, or no safetensors file: {why}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(names := dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return names


def _entry(path: Path, entry: dict[str, Any], data: int) -> tuple[Tensor, tuple[int, int]]:
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"sizes {shape} and offsets {start} to {stop} must be whole numbers")
    if 8 * (stop - start) != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{dtype} {shape} does not fill bytes {start} to {stop}")
    return Tensor(path, dtype, tuple(shape), data + start), (start, stop)
