"""Strictness for every test: what JAX would do implicitly is an error here."""

import gc
import os

# Before jax is imported: eight CPU devices, so that shardings are real. What is compiled here runs
# once or twice, on a few numbers, so LLVM's own optimizations cost more than they gain; XLA's stay.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    + os.environ.get("XLA_FLAGS", "")
)
os.environ["JAX_PLATFORMS"] = "cpu"

from pathlib import Path

from running import CACHED, WITH_BLEU, train, write_text

# Tests, and the cases of one, compile much that is the same behind functions that are not.
os.environ.update(CACHED)

import jax
import pytest


def pytest_collection_finish():
    """Spares the garbage collector all that was imported, at each of its many rounds: tracing makes
    objects by the million."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(autouse=True)
def strict_jax():
    """Ranks and dtypes are promoted by hand or not at all."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """A directory with parallel text and, under `run`, a model trained on it for 8 steps."""
    directory = tmp_path_factory.mktemp("project")
    write_text(directory)
    train(directory, "run", WITH_BLEU)
    return directory
