"""What a training run leaves in its working directory so that it can be resumed and decoded with.

config.json          the resolved config
tokenizer.model      the tokenizer that the data was prepared with
checkpoints/         `mqa_jax.train.checkpoint`
metrics.jsonl        `mqa_jax.train.metrics`, and TensorBoard's event files
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

CONFIG = "config.json"
TOKENIZER = "tokenizer.model"
CHECKPOINTS = "checkpoints"


def claim(workdir: str | Path, config: ConfigDict) -> Path:
    """Makes `workdir` the directory of a run with this config, or finds that it already is.

    The mesh may be another one: a run can go on with more or fewer devices.

    Raises:
      ValueError: it belongs to a run with another config; the message lists the differences.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    asked = json.loads(config.to_json())
    if (workdir / CONFIG).exists():
        found = json.loads((workdir / CONFIG).read_text(encoding="utf-8"))
        asked["mesh"] = found["mesh"] = None
        if differences := list(_differences("config", found, asked)):
            raise ValueError(
                f"{workdir} holds a run with another config:\n  "
                + "\n  ".join(differences)
                + "\nname another --workdir, or give the config that it was started with"
            )
    else:
        _write(workdir / CONFIG, json.dumps(asked, indent=2) + "\n")
    return workdir


def load_config(workdir: str | Path) -> ConfigDict:
    """The config of the run in `workdir`.

    Raises:
      ValueError: there is none.
    """
    path = Path(workdir) / CONFIG
    if not path.exists():
        raise ValueError(f"no {path}: {workdir} is not the --workdir of a training run")
    return ConfigDict(json.loads(path.read_text(encoding="utf-8")))


def keep_tokenizer(workdir: str | Path, tokenizer: str | Path) -> Path:
    """Copies the tokenizer into `workdir`, which then is all that decoding needs.

    Raises:
      ValueError: the run in `workdir` was started with another one.
    """
    path = Path(workdir) / TOKENIZER
    if not path.exists():
        partial = path.with_suffix(".partial")
        shutil.copyfile(tokenizer, partial)
        os.replace(partial, path)
    if path.read_bytes() != Path(tokenizer).read_bytes():
        raise ValueError(
            f"{path} and {tokenizer} differ: the data was prepared anew since this run began; "
            "name another --workdir, or prepare the data as it was"
        )
    return path


def _write(path: Path, text: str) -> None:
    """The file appears with all of its text, or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _differences(name: str, found: Any, asked: Any) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in sorted(found.keys() | asked.keys()):
            yield from _differences(
                f"{name}.{key}", found.get(key, "nothing"), asked.get(key, "nothing")
            )
    elif found != asked:
        yield f"{name}: {found!r} there, {asked!r} asked"
