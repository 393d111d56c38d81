"""Commands inside of the test's own process, which is quick; some tests start one of their own."""

import sys

import pytest


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch):
    """A command sets the arguments of the process."""
    monkeypatch.setattr(sys, "argv", ["mqa-jax"])
