"""A directory of the hub as a model: checked whole, then read tensor by tensor."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mqa_jax.core.arrays import check_dtype
from mqa_jax.core.checks import check_integer
from mqa_jax.core.quantized import LARGEST, check_scales, is_scales
from mqa_jax.core.sharding import ShardingRules
from mqa_jax.hub.families import read_options
from mqa_jax.hub.family import Family
from mqa_jax.hub.files import CONFIG, Directory, Tensor, is_finite
from mqa_jax.hub.generation import Generation, read_generation
from mqa_jax.hub.tensors import Stored, is_norm, stored_weights
from mqa_jax.hub.tokenizer import Tokenizer, load_tokenizer
from mqa_jax.model.config import TransformerConfig
from mqa_jax.model.transformer import MODELS, Model

SOFTMAX = "lm_head.weight"
TIED = "tie_word_embeddings"
MOST_SINES = 2**28  # In the table of a model whose positions are sinusoidal: 1 GiB.
# What stands beside the part of a model that `Family.head` names.
_HEADLESS = (SOFTMAX, "final_logits_bias")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What a directory of the hub holds.

    Attributes:
      model: with its weights.
      tokenizer: None where the directory has none that can be read.
      generation: how its authors mean it to be decoded.
      family: its `model_type`.
    """

    model: Model
    tokenizer: Tokenizer | None
    generation: Generation
    family: str


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: DTypeLike = "float32",
    max_length: int | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> Pretrained:
    """Reads a model that was downloaded from the Hugging Face hub, or that `save` wrote.

    No weight is read of a directory in which anything is not understood. Then tensors are read one
    by one, and each goes where it belongs: there is never a second copy of the model.

    Args:
      directory: with `config.json`, and weights as safetensors.
      dtype: float32 or bfloat16, of the activations, and of all weights but those of norms, which
        are float32.
      max_length: the longest sequence, in place of what `config.json` says (512 for T5, which has
        no longest one). A model with a table of positions has just those.
      mesh: what the weights are split over; one device when None.
      rules: how they are; `ShardingRules()` when None.

    Raises:
      ValueError: what is there is damaged, or not supported; a tensor is missing, misshapen, or
        one too many; a weight is NaN or infinite. The message names the file, and the key or the
        tensor.
    """
    if mesh is None and rules is not None:
        raise ValueError("rules are of no effect without a mesh: give mesh=, or leave them out")
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, as make_mesh makes one, not {mesh!r}")
    files = Directory(directory)
    family, config = _options(files, dtype, max_length)
    config, sources_of = _checked(family, config, files)
    generation = read_generation(files, config.vocab_size, family.task == "translation")
    tokenizer = load_tokenizer(files.path, family.model_type)

    model = nnx.eval_shape(lambda: MODELS[family.task](config, rngs=nnx.Rngs(params=0)))
    graphdef, state = nnx.split(model)
    abstract = weights_by_path(state)
    stored = stored_weights(family, config, {path: x.shape for path, x in abstract.items()})
    sources = sources_of(stored)
    weights = {}
    # File by file, as disks are read from front to back.
    for source, tensor in sorted(sources.items(), key=lambda item: _place(files, item[0])):
        own = jnp.dtype(abstract[next(iter(tensor.weights))].dtype)
        is_narrow, is_scale = own in LARGEST, config.quantized and is_scales(source)
        content = files.read_eight_bits(source, own) if is_narrow else files.read(source)
        if is_scale:
            check_scales(f"{source} in {files.tensors[source].file}", content)
        for path, array in zip(tensor.weights, tensor.apart(content), strict=True):
            axes, sharding = abstract[path].get_metadata().get("axes", ""), None
            if mesh is not None:
                shape = array.shape if axes else ()
                sharding = (rules or ShardingRules()).sharding(mesh, axes, shape)
            if not is_narrow:
                wide = is_scale or is_norm(path)
                array = _cast(array, np.dtype("float32" if wide else config.dtype), source, files)
            weights[path] = abstract[path].replace(jax.device_put(array, sharding))
    state = nnx.map_state(lambda path, _: weights[_dotted(path)], state)
    return Pretrained(nnx.merge(graphdef, state), tokenizer, generation, family.model_type)


def read_config(
    directory: str | os.PathLike[str],
    *,
    dtype: DTypeLike = "float32",
    max_length: int | None = None,
) -> tuple[str, TransformerConfig]:
    """What a `config.json` asks for, with or without weights: the model can be built, and measured.

    Args:
      directory: with `config.json`.
      dtype: as for `load`.
      max_length: as for `load`.

    Returns:
      the task, of `mqa_jax.model.transformer.MODELS`, and the sizes.

    Raises:
      ValueError: as `load`, of `config.json` alone.
    """
    files = Directory(directory)
    family, config = _options(files, dtype, max_length)
    if files.has_weights:
        config, _ = _checked(family, config, files)
    return family.task, config


def weights_by_path(state: nnx.State) -> dict[str, nnx.Variable]:
    """A model's weights, by the names of attributes that lead to each, dots between them."""
    return {_dotted(path): weight for path, weight in nnx.to_flat_state(state)}


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _options(
    files: Directory, dtype: DTypeLike, max_length: int | None
) -> tuple[Family, TransformerConfig]:
    name = check_dtype("dtype", dtype).name
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {name}: a model of the hub is loaded in float32 or bfloat16")
    where = str(files.path / CONFIG)
    family, fields = read_options(files.config, where)
    try:
        config = TransformerConfig(**fields, dtype=name, param_dtype=name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if max_length is not None and check_integer("max_length", max_length) != config.max_length:
        config = _of_length(config, max_length, where)
    if config.positions == "sinusoidal" and config.max_length * config.d_model > MOST_SINES:
        raise ValueError(
            f"{where}: max_position_embeddings is {config.max_length}, and the sines of so many "
            f"positions are {config.max_length * config.d_model} numbers: give a max_length"
        )
    return family, config


def _of_length(config: TransformerConfig, max_length: int, where: str) -> TransformerConfig:
    if config.positions == "learned":
        raise ValueError(
            f"max_length={max_length}, but {where} has a table of {config.max_length} positions: "
            "leave max_length out"
        )
    return dataclasses.replace(config, max_length=max_length)


def _cast(array: np.ndarray, dtype: np.dtype, source: str, files: Directory) -> np.ndarray:
    """An array of finite numbers, which they must stay."""
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if jnp.finfo(array.dtype).max > jnp.finfo(dtype).max and not is_finite(cast):
        raise ValueError(
            f"{source} in {files.tensors[source].file} has numbers that {dtype} has not, up to "
            f"{np.abs(array).max():g}: load it in a dtype that does"
        )
    return cast


def _checked(
    family: Family, config: TransformerConfig, files: Directory
) -> tuple[TransformerConfig, Callable[[Mapping[str, Stored]], dict[str, Stored]]]:
    """The config with the softmax that the tensors have, and what finds these by their names."""
    if config.quantized is not None:
        has_softmax = any(name.startswith("softmax.") for name in files.tensors)
        config = dataclasses.replace(config, tied_softmax=not has_softmax)
        return config, functools.partial(_own_sources, config, files)
    named = _named(family, files)
    table = _table(family, config, files, named)
    config = _with_softmax(family, config, files, named, table)
    return config, functools.partial(_sources, family, config, files, named, table)


def _own_sources(
    config: TransformerConfig, files: Directory, stored: Mapping[str, Stored]
) -> dict[str, Stored]:
    """As `_sources`, of a quantized model."""
    for name, tensor in stored.items():
        if name not in files.tensors:
            raise _missing(files, name)
        if (found := files.tensors[name]).shape != tensor.shape:
            raise _misshapen(files, name, found, tensor)
    if extra := sorted(set(files.tensors) - set(stored)):
        raise _extra(files, config, extra)
    return dict(stored)


def _named(family: Family, files: Directory) -> dict[str, str]:
    """The names that the family has for tensors, and those that they have in the files."""
    named: dict[str, str] = {}
    for name in files.tensors:
        is_whole = name.startswith(family.head) or name in _HEADLESS
        full = name if is_whole else family.head + name
        if full in named:
            raise ValueError(f"{files.path} has both {named[full]} and {name}, which are the same")
        named[full] = name
    return named


def _with_softmax(
    family: Family,
    config: TransformerConfig,
    files: Directory,
    named: Mapping[str, str],
    table: str,
) -> TransformerConfig:
    """Of a softmax product of its own where the files have one that is not the token table.

    Raises:
      ValueError: there is none, though the directory says that there is.
    """
    if SOFTMAX not in named and family.says_tied and files.config.get(TIED) is False:
        raise _missing(files, f"{SOFTMAX} ({TIED} is false)")
    is_tied = SOFTMAX not in named or files.are_equal(named[SOFTMAX], table)
    return dataclasses.replace(config, tied_softmax=is_tied)


def _table(
    family: Family, config: TransformerConfig, files: Directory, named: Mapping[str, str]
) -> str:
    """The name of the token table in the files, of which all copies are equal.

    Raises:
      ValueError: there is none, or two differ.
    """
    own = family.names(config)["embedding"] + ".weight"
    names = [name for name in (own, *family.tables) if name in named]
    # It may be stored under any one of its names, and the softmax product's is one where it is so.
    if not names and config.tied_softmax and SOFTMAX in named:
        names = [SOFTMAX]
    if not names:
        raise _missing(files, own)
    for copy in names[1:]:
        if not files.are_equal(named[names[0]], named[copy]):
            raise ValueError(
                f"{named[copy]} and {named[names[0]]} in {files.path} differ, but they are one "
                f"table in a {family.model_type}"
            )
    return named[names[0]]


def _sources(
    family: Family,
    config: TransformerConfig,
    files: Directory,
    named: Mapping[str, str],
    table: str,
    stored: Mapping[str, Stored],
) -> dict[str, Stored]:
    """What each tensor of the files holds.

    Raises:
      ValueError: one is missing, or one too many, or of another shape, or not of floats.
    """
    sources = {}
    for name, tensor in stored.items():
        if "embedding.table" in tensor.weights:
            sources[table] = tensor
        elif name in named:
            sources[named[name]] = tensor
        else:
            raise _missing(files, name)
    copies = {*family.tables, family.names(config)["embedding"] + ".weight", SOFTMAX}
    extra = [
        name
        for full, name in named.items()
        if name not in sources and full not in copies and not _is_ignored(family, full, files, name)
    ]
    if extra:
        raise _extra(files, config, extra)
    for name, tensor in sources.items():
        found = files.floats(name)
        if found.shape != tensor.shape:
            raise _misshapen(files, name, found, tensor)
    return sources


def _extra(files: Directory, config: TransformerConfig, names: Sequence[str]) -> ValueError:
    count = f" (of {len(names)} such)" if len(names) > 1 else ""
    return ValueError(
        f"{files.path} has {names[0]}, {files.tensors[names[0]]}{count}, but the model of its "
        f"{CONFIG}, of {config.num_layers} layers, has no place for it: they do not belong "
        "together, or a key is missing there"
    )


def _misshapen(files: Directory, name: str, found: Tensor, wanted: Stored) -> ValueError:
    return ValueError(
        f"{name} is {found}, but by {files.path / CONFIG} it must be {list(wanted.shape)}"
    )


def _missing(files: Directory, name: str) -> ValueError:
    return ValueError(
        f"{files.path} lacks the tensor {name}, which the model of its {CONFIG} needs: download it "
        "again, or look whether the two belong together"
    )


def _is_ignored(family: Family, full: str, files: Directory, name: str) -> bool:
    rank = len(files.tensors[name].shape)
    return any(
        re.fullmatch(pattern, full) and ranks in (None, rank)
        for pattern, ranks in family.ignored.items()
    )


def _place(files: Directory, name: str) -> str:
    return files.tensors[name].file.name
