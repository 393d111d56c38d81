"""A run's model after its conversion, as a directory that is read as a run's.

It has the weights alone: it is decoded with, and, unless they are in eight bits, trained further
through `config.init_from`, but not gone on with, since the optimizer's state is of another model.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from mqa_jax.convert import kv_heads
from mqa_jax.core.paths import new_directory, written_whole
from mqa_jax.model.transformer import Model
from mqa_jax.train.checkpoint import Checkpoints
from mqa_jax.train.state import TrainState
from mqa_jax.train.workdir import (
    CHECKPOINTS,
    CONFIG,
    CONVERTED,
    DATA,
    Run,
    describe,
    write_json,
)


def save_converted(
    directory: str | os.PathLike[str], run: Run, model: Model, record: Mapping[str, Any]
) -> None:
    """Writes the directory of a converted run, whole or not at all.

    Args:
      directory: a new one, or an empty one.
      run: what was converted.
      model: what became of its model.
      record: how, as JSON; `config.converted` from then on.

    Raises:
      ValueError: there is something in the directory.
      SaveError: the weights could not be written.
    """
    path = new_directory("the directory", directory)
    fields = run.config.to_dict()
    own = model.config
    fields["model"] |= kv_heads(model) | dict(quantized=own.quantized, cache_dtype=own.cache_dtype)
    about = describe(ConfigDict(fields | {CONVERTED: dict(record)})) | {"data": dict(run.data)}
    with written_whole(path) as temporary:
        with Checkpoints(temporary / CHECKPOINTS, run=about) as checkpoints:
            checkpoints.save(TrainState(jnp.int32(run.step), nnx.as_pure(nnx.state(model)), None))
        (temporary / run.tokenizer.file_name).write_bytes(run.tokenizer.content)
        write_json(temporary / DATA, about["data"])
        write_json(temporary / CONFIG, about["config"])
