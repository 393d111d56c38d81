"""What a search is given, checked before it starts: shapes, ids, numbers, keys, room in the cache.

What `jax.jit` traces has no value to check; the searches see to it that nothing plausible comes of
it.

Array letters: B batch   V vocabulary   E ids that end a row
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mqa_jax.attention.cache import KVCache
from mqa_jax.core.checks import check_integer, check_number

# The token that ends a row, or several of them, each of which does; None: there is no such token.
EndIds = int | Sequence[int] | Array | None

_LARGEST = float(np.finfo(np.float32).max)


def check_search(
    step_fn: Callable,
    cache: Any,
    tokens_B: Array,
    max_new_tokens: int,
    eos_id: EndIds,
    pad_id: int,
) -> tuple[Array, int]:
    """Raises ValueError on arguments that do not fit.

    Returns:
      the ids that end a row, `[E]`, and the size of the vocabulary.
    """
    if not isinstance(tokens_B, Array | np.ndarray):
        raise ValueError(f"tokens_B must be an array of shape [B], not {tokens_B!r}")
    if tokens_B.ndim != 1:
        raise ValueError(f"tokens_B must have shape [B], not {list(tokens_B.shape)}")
    if not jnp.issubdtype(tokens_B.dtype, jnp.integer):
        raise ValueError(f"tokens_B must be integers, not {tokens_B.dtype}")
    check_integer("max_new_tokens", max_new_tokens)
    batch = tokens_B.shape[0]
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
        if np.shape(leaf)[:1] != (batch,):
            raise ValueError(
                f"cache{jax.tree_util.keystr(path)} has shape {list(np.shape(leaf))}, but "
                f"everything in the cache must have the {batch} rows of tokens_B in front; what is "
                "not a row's own belongs into step_fn"
            )
    _check_room(cache, max_new_tokens)
    logits, _ = jax.eval_shape(step_fn, tokens_B.astype(jnp.int32), cache)
    if logits.ndim != 2 or logits.shape[0] != batch or not logits.shape[1]:
        raise ValueError(f"step_fn must return logits [{batch}, V], not {list(logits.shape)}")
    vocab_size = logits.shape[1]
    for row, token in enumerate(known_values(tokens_B)):
        check_token(f"tokens_B[{row}]", token, vocab_size)
    check_token("pad_id", pad_id, vocab_size)
    return end_ids(eos_id, vocab_size), vocab_size


def check_token(name: str, token: int | Array, vocab_size: int) -> None:
    """Raises ValueError unless `token` is an id of the vocabulary; nothing is known of tracers."""
    if isinstance(token, jax.core.Tracer):
        return
    id = check_integer(name, token, least=-(2**63))
    if not 0 <= id < vocab_size:
        raise ValueError(f"{name}={id} is not in the vocabulary of {vocab_size} tokens")


def known_values(array: ArrayLike) -> list:
    """What is in an array, flat, where that can be told: nothing of a tracer or of other hosts."""
    if isinstance(array, jax.core.Tracer) or not getattr(array, "is_fully_addressable", True):
        return []
    return np.asarray(array).reshape(-1).tolist()


def typed_keys(key: Array) -> Array:
    """PRNG keys as `jax.random.key` makes them, from these or from those of `jax.random.PRNGKey`.

    Raises:
      ValueError: neither.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    try:
        if dtype == jnp.uint32:
            return jax.random.wrap_key_data(jnp.asarray(key))
    except TypeError:
        pass
    raise ValueError(f"key must be a PRNG key, made by jax.random.key(seed), not {key!r}")


def _check_room(cache: Any, max_new_tokens: int) -> None:
    def is_bounded(node: Any) -> bool:
        return isinstance(node, KVCache)

    for node in filter(is_bounded, jax.tree.leaves(cache, is_leaf=is_bounded)):
        held, capacity = max(known_values(node.length), default=None), node.key.shape[-2]
        if held is not None and held + max_new_tokens > capacity:
            raise ValueError(
                f"the cache has room for {capacity} tokens and holds {held}: too few are left for "
                f"max_new_tokens={max_new_tokens}. Make it with init_cache(batch, "
                f"{held + max_new_tokens})"
            )


def end_ids(eos_id: EndIds, vocab_size: int) -> Array:
    """The ids that end a row, `[E]` int32; raises ValueError for what is no id."""
    if eos_id is None:
        return jnp.zeros(0, jnp.int32)
    if any(isinstance(id, jax.core.Tracer) for id in jax.tree.leaves(eos_id)):
        traced = jnp.asarray(eos_id)
        if traced.ndim > 1 or not jnp.issubdtype(traced.dtype, jnp.integer):
            raise ValueError(f"eos_id must be one integer or several, not {traced}")
        return traced.astype(jnp.int32).reshape(-1)
    ids = np.asarray(eos_id)
    if ids.ndim > 1 or not ids.size:
        raise ValueError(f"eos_id must be one integer or several, or None, not {eos_id!r}")
    ends = sorted(set(ids.reshape(-1).tolist()))
    for end in ends:
        check_token("eos_id", end, vocab_size)
    return jnp.asarray(ends, jnp.int32)


def per_row(
    name: str, value: ArrayLike, rows: tuple[int, ...], hint: str = "", **limits: float
) -> np.ndarray | Array:
    """`value`, `[]` or `[B]`, as `[]` or `[B, 1]`; checked in float64 unless it is traced, and for
    being a number in float32 too."""
    shape = np.shape(value)
    if shape not in ((), rows):
        raise ValueError(
            f"{name} must be one number, or one a row, {list(rows)}: not {list(shape)} of them"
        )
    column = (*shape, 1) if shape else ()
    if isinstance(value, jax.core.Tracer):
        if value.dtype == bool:
            raise ValueError(f"{name} must be a number, not {value}")
        return value.astype(jnp.float32).reshape(column)
    flat = np.asarray(value).reshape(-1).tolist()
    try:
        numbers = np.array([check_number(name, number, **limits) for number in flat])
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    for number in numbers[abs(numbers) > _LARGEST]:
        raise ValueError(f"{name} must be a number of float32, which {number} is too large for")
    return numbers.reshape(column)


def keys_of(search: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether a search takes keys, and whether it needs them.

    Raises:
      ValueError: what is no search, or has an argument bound that it is given here.
    """
    if not callable(search):
        raise ValueError(
            "search must be a function, such as mqa_jax.greedy, with its options bound by "
            f"functools.partial, not {search!r}"
        )
    bound = getattr(search, "keywords", {})
    for name in ("max_new_tokens", "key", "prompt", "begun", "steps"):
        if name in bound:
            raise ValueError(f"{name} is given to the generator, or by it: do not bind it")
    for name, value in _numbers(bound):
        if np.ndim(value):
            raise ValueError(
                f"{name} is {value!r}, one a row, but a generator's prompts have no rows of their "
                "own: give one for all, or use `generate`"
            )
    parameters = inspect.signature(search).parameters
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    key = parameters.get("key")
    return takes_any or key is not None, key is not None and key.default is key.empty


def _numbers(bound: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The options of a search, and those of its rules, that may be one a row."""
    for name in ("temperature", "top_p", "min_p"):
        yield name, bound.get(name)
    for rule in bound.get("rules") or ():
        for name in ("penalty", "count", "value", "mass", "share"):
            yield f"{name} of {type(rule).__name__}", getattr(rule, name, None)
