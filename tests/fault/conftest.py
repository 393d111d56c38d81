"""One undisturbed run, which the disturbed ones must end like."""

from pathlib import Path

import pytest
from running import train, write_text


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """A directory with parallel text and, under `run`, a model trained on it for 8 steps."""
    directory = tmp_path_factory.mktemp("fault")
    write_text(directory)
    train(directory, "run")
    return directory
