"""Distillation: the trained model that a run learns from too, `config.train.teacher`."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mqa_jax.core.paths import local_path
from mqa_jax.model.transformer import Model, build_model
from mqa_jax.train.checkpoint import Checkpoints
from mqa_jax.train.start import read_model
from mqa_jax.train.state import abstract_params
from mqa_jax.train.workdir import CHECKPOINTS, check_unchanged


class Teacher(NamedTuple):
    """A trained model to learn from.

    Attributes:
      model: its structure.
      params: its weights, where the rules put them on a mesh.
      ids_sha256: of its tokenizer.
      sha256: of all that its predictions follow from, which must not change under a run.
    """

    model: Model
    params: nnx.State
    ids_sha256: str
    sha256: str

    def check_tokenizer(self, ids_sha256: str) -> None:
        """Raises a ValueError if the ids of a run's tokenizer mean something else."""
        if ids_sha256 != self.ids_sha256:
            raise ValueError(
                "--config.train.teacher has another tokenizer than the data, and ids of other "
                "meaning: prepare the text as the teacher's was, or --config.init_from a model "
                "that was made of it"
            )


def find_teacher(config: ConfigDict, mesh: Mesh, *, is_abstract: bool = False) -> Teacher | None:
    """Reads `config.train.teacher`, if there is to be one.

    Args:
      config: a run's, resolved.
      mesh: where the weights go.
      is_abstract: shapes and places in place of weights.

    Raises:
      ValueError: it is not the directory of a model, or the model is of another task, vocabulary or
        too few positions.
    """
    if not (text := config.train.teacher):
        return None
    name = f"--config.train.teacher {text!r}"
    path = local_path("--config.train.teacher", text)
    is_run, fields, tokenizer, read = read_model(name, path, config)
    fields |= {field: config.model[field] for field in ("dtype", "param_dtype")}
    model = nnx.eval_shape(lambda: build_model(config.task, fields, rngs=nnx.Rngs(params=0)))
    if fields["vocab_size"] != config.model.vocab_size:
        raise ValueError(
            f"{name} predicts {fields['vocab_size']} ids, --config.model.vocab_size is "
            f"{config.model.vocab_size}: they must be the same"
        )
    longest = max(config.data.source_length, config.data.target_length)
    if longest > fields["max_length"]:
        raise ValueError(
            f"{name} has {fields['max_length']} positions, and rows of the data are of {longest}: "
            "lower --config.data.source_length and target_length"
        )
    params = abstract_params(model, mesh)
    if is_abstract:
        return Teacher(model, params, tokenizer.ids_sha256, sha256="")
    if is_run:
        with Checkpoints(path / CHECKPOINTS) as checkpoints:
            check_unchanged(path, checkpoints.run())
            folder = path / CHECKPOINTS / str(checkpoints.whole_step())
            files = {file for file in folder.rglob("*") if file.is_file()}
            params, sha256 = checkpoints.restore_params(params), _sha256(fields, files)
    else:
        from mqa_jax.hub.files import Directory

        files = {tensor.file for tensor in Directory(path).tensors.values()}
        params, sha256 = read(params, mesh), _sha256(fields, files)
    if not are_finite(params, mesh):
        raise ValueError(
            f"{name} has weights that are not finite in {config.model.param_dtype}: whatever it "
            "taught would be skipped; name another"
        )
    return Teacher(model, params, tokenizer.ids_sha256, sha256)


def are_finite(params: nnx.State, mesh: Mesh) -> bool:
    """Whether all weights are, of all devices."""

    def look(params: nnx.State) -> jax.Array:
        return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))

    return bool(jax.jit(look, out_shardings=NamedSharding(mesh, PartitionSpec()))(params))


def _sha256(fields: dict, files: Iterable[Path]) -> str:
    """Of a model's fields, and of files and their names."""
    found = [json.dumps(fields, sort_keys=True, default=str)]
    for path in sorted(files):
        with path.open("rb") as file:
            found.append(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()
