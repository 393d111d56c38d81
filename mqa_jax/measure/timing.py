"""The clock of the benchmark, which starts for nothing that was not compiled before."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

LONG_SECONDS = 5.0

# JAX tells its listeners so whenever it makes a program, from its compilation cache too.
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def no_compilation() -> Iterator[None]:
    """Nothing may be compiled within, or the times there would be of compiling.

    Raises:
      RuntimeError: something was.
    """
    programs = []

    def listen(event: str, duration_secs: float, **metadata: str | int) -> None:
        if event == COMPILE_EVENT:
            programs.append(str(metadata.get("fun_name", "a program")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    if programs:
        raise RuntimeError(
            f"compiled while measuring: {', '.join(programs)}; the times are not those of decoding"
        )


def timed(program: Callable, *args: Any) -> tuple[float, Any]:
    """The seconds of one call, and what it returned."""
    start = time.perf_counter()
    output = jax.block_until_ready(program(*args))
    return time.perf_counter() - start, output


def milliseconds(run: Callable[[], float], repeats: int, once_if_long: bool = False) -> list[float]:
    """Of `repeats` runs (which return seconds) after one that does not count; or, where that has
    taken long enough for a first time not to matter, of that one alone."""
    with no_compilation():
        first = run()
        if once_if_long and first >= LONG_SECONDS:
            return [1e3 * first]
        return [1e3 * run() for _ in range(repeats)]
