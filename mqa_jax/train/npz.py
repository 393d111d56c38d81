"""A run's model as one file of NumPy, for what knows neither Orbax nor this package."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mqa_jax.train.workdir import Run

CONFIG = "config"


def save_npz(path: Path, run: Run) -> None:
    """Writes the weights, by the dotted paths of their names, and the model's config.

    The config is JSON, a string under the name `config`: `task`, and `model`, the fields of
    `TransformerConfig`. NumPy has no bfloat16: such weights are stored as the same numbers in
    float32. The file is there whole, or not at all.

    Args:
      path: of a new file; its directory is made if it is not there.

    Raises:
      ValueError: there is something at `path`.
    """
    if path.exists():
        raise ValueError(f"{path} is there already: give another name, or remove it")
    arrays: dict[str, Any] = {
        jax.tree_util.keystr(keys, simple=True, separator="."): _of_numpy(weight)
        for keys, weight in jax.tree_util.tree_leaves_with_path(nnx.as_pure(run.params))
    }
    config = {"task": run.config.task, "model": json.loads(run.config.model.to_json())}
    arrays[CONFIG] = np.array(json.dumps(config))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _of_numpy(weight: jax.Array) -> np.ndarray:
    return np.asarray(weight.astype(np.float32) if weight.dtype == "bfloat16" else weight)
