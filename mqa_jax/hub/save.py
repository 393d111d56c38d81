"""A model as a directory of the hub, which transformers reads."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax import nnx

from mqa_jax.core.checks import check_integer
from mqa_jax.core.paths import new_directory, written_whole
from mqa_jax.hub.families import family_named, write_options
from mqa_jax.hub.files import CONFIG, GENERATION, INDEX, WEIGHTS, is_finite
from mqa_jax.hub.generation import Generation, write_generation
from mqa_jax.hub.load import SOFTMAX, Pretrained, weights_by_path
from mqa_jax.hub.tensors import Stored, stored_weights
from mqa_jax.model.transformer import MODELS, Model

# Of a file's tensors, unless one is larger: as much is in memory beside the model.
SHARD_BYTES = 2_000_000_000


def save(
    directory: str | os.PathLike[str],
    pretrained: Pretrained | Model,
    *,
    family: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `config.json` and safetensors, and what else a `Pretrained` has.

    The directory is there whole, or not at all. Weights keep their dtype; what `load` reads of it
    is equal bit for bit.

    Args:
      directory: a new one, or an empty one.
      pretrained: as `load` gave it; or a model alone, then without a tokenizer.
      family: the `model_type` to save it as, of `mqa_jax.hub.families.FAMILIES`; that which it
        was loaded as when None.
      shard_bytes: tensors of more than that are written as several files.

    Raises:
      ValueError: there is something in the directory; the family is not known, or does not have
        what this model does: another kind of norm, say; a weight is NaN or infinite.
    """
    path = new_directory("the directory", directory)
    check_integer("shard_bytes", shard_bytes)
    if not isinstance(pretrained, Pretrained):
        if family is None:
            raise ValueError("a model alone does not say what to save it as: give family=")
        pretrained = Pretrained(pretrained, None, Generation(), family)
    model, kind = pretrained.model, family_named(family or pretrained.family)
    if not isinstance(model, MODELS[kind.task]):
        raise ValueError(
            f"a {kind.model_type} is of the class {MODELS[kind.task].__name__}, not "
            f"{type(model).__name__}: give another family"
        )
    config = write_options(kind, model.config)
    generation = write_generation(pretrained.generation)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    config |= {key: generation[key] for key in ids if key in generation}
    weights = weights_by_path(nnx.state(model))
    stored = stored_weights(kind, model.config, {p: x.shape for p, x in weights.items()})
    is_own = model.config.quantized is not None
    if SOFTMAX not in stored and not config["tie_word_embeddings"] and not is_own:
        # A T5 without the factor of tied weights: of version 4 it has a copy of its own.
        table = next(tensor for tensor in stored.values() if "embedding.table" in tensor.weights)
        stored[SOFTMAX] = table
    with written_whole(path) as temporary:
        _write_json(temporary / CONFIG, config)
        _write_json(temporary / GENERATION, generation)
        if pretrained.tokenizer is not None:
            for name, content in pretrained.tokenizer.files.items():
                (temporary / name).write_bytes(content)
        _write_weights(temporary, stored, weights, shard_bytes)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(
    directory: Path,
    stored: Mapping[str, Stored],
    weights: Mapping[str, nnx.Variable],
    shard_bytes: int,
) -> None:
    sizes = {
        name: sum(weights[path][...].nbytes for path in tensor.weights)
        for name, tensor in stored.items()
    }
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WEIGHTS
        tensors = {
            name: stored[name].together([np.asarray(weights[p][...]) for p in stored[name].weights])
            for name in names
        }
        if bad := [name for name, array in tensors.items() if not is_finite(array)]:
            raise ValueError(f"{bad[0]} has weights that are NaN or infinite: they are no model")
        # transformers asks for the word.
        safetensors.numpy.save_file(tensors, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = dict(metadata=dict(total_size=sum(sizes.values())), weight_map=places)
        _write_json(directory / INDEX, index)
