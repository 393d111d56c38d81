"""What a run has come to, bit for bit."""

from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
from running import checkpoints


def final_bytes(workdir: Path) -> dict[str, bytes]:
    """Of each array of the last checkpoint."""
    step = workdir / "checkpoints" / str(checkpoints(workdir)[-1])
    arrays = {}
    for item in ("params", "optimizer"):
        with ocp.StandardCheckpointer() as checkpointer:
            for name, array in checkpointer.restore(step / item).items():
                arrays[f"{item}/{name}"] = np.asarray(array).tobytes()
    return arrays
