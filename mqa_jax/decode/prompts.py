"""Behind prompts, with the project's own models: decoding, and scores of what is given.

Array letters: B batch   P prompt length   F prefix length   T answer length   L max_new_tokens
V vocabulary   R rows, B or B times beam
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mqa_jax.attention.cache import CrossCache
from mqa_jax.attention.module import SelfCache
from mqa_jax.core.arrays import as_int32
from mqa_jax.core.checks import check_integer
from mqa_jax.decode.arguments import check_token, known_values
from mqa_jax.decode.search import Decoded, StepFn
from mqa_jax.model.transformer import EncoderDecoder, Model

Search = Callable[..., Decoded]


def generate(
    model: Model,
    prompt_BP: Array,
    lengths_B: Array,
    *,
    search: Search,
    max_new_tokens: int,
    bos_id: int,
    prefix: tuple[Array, Array] | None = None,
    **search_options: Any,
) -> Decoded:
    """Decodes behind a batch of prompts; to be called inside `jax.jit`.

    Args:
      model: an `EncoderDecoder` translates its prompts, a `DecoderOnly` continues them.
      prompt_BP: `[B, P]` ids padded on the right; a language model's begin with `bos_id`.
      lengths_B: `[B]`, how many of the `P` are real, at least 1.
      search: `greedy`, `sample` or `beam_search`, or a function with the same first arguments. If
        it has an argument `prompt`, as these have, it is told what its rules should know.
      max_new_tokens: `L`.
      bos_id: the id that a target sentence begins with.
      prefix: for translations, what the answer continues: `[B, F]` ids padded on the right, and
        `[B]`, how many of them are real, 0 perhaps. What is decoded is what follows; it alone
        counts for scores and length penalties.
      search_options: passed on to `search`.

    Raises:
      ValueError: prompt and answer do not fit into the positions that the model knows; shapes that
        do not fit; a length that is not from 1 to `P`, an id outside the vocabulary; a prefix for
        a language model, of which the prompt is the beginning. Lengths that are traced cannot be
        checked: `Decoded.is_finite` is False for a row with a wrong one.
    """
    start = begin(model, prompt_BP, lengths_B, max_new_tokens, bos_id=bos_id, prefix=prefix)
    return search(
        step_of(model, start),
        start.cache,
        start.last,
        max_new_tokens=max_new_tokens,
        **told(search, start),
        **search_options,
    )


def score(
    model: Model,
    prompt_BP: Array,
    lengths_B: Array,
    answer_BT: Array,
    answer_lengths_B: Array,
    *,
    bos_id: int,
) -> Array:
    """Log-probabilities of given answers, all tokens at once; to be called inside `jax.jit`.

    They are what `Decoded.token_scores` of a search is that chose these tokens.

    Args:
      answer_BT: `[B, T]` ids padded on the right; the end of a sentence is a token like others.
      answer_lengths_B: `[B]`, how many of the `T` are real, at least 1.
      Others: as `generate`.

    Returns:
      `[B, T]` float32; 0 for padding. NaN for a row with a wrong length that was traced.

    Raises:
      ValueError: as `generate`, of prompts and of answers.
    """
    logits_BTV = answer_logits(
        model, prompt_BP, lengths_B, answer_BT, answer_lengths_B, bos_id=bos_id
    )
    answer_BT, answer_lengths_B = as_int32(answer_BT), as_int32(answer_lengths_B)
    length = answer_BT.shape[1]
    log_prob_BTV = jax.nn.log_softmax(logits_BTV.astype(jnp.float32))
    log_prob_BT = jnp.take_along_axis(log_prob_BTV, answer_BT[:, :, None], axis=2)[:, :, 0]
    is_real_BT = jnp.arange(length)[None] < answer_lengths_B[:, None]
    is_length_B1 = ((answer_lengths_B >= 1) & (answer_lengths_B <= length))[:, None]
    return jnp.where(is_length_B1, jnp.where(is_real_BT, log_prob_BT, 0.0), jnp.nan)


def answer_logits(
    model: Model,
    prompt_BP: Array,
    lengths_B: Array,
    answer_BT: Array,
    answer_lengths_B: Array,
    *,
    bos_id: int,
) -> Array:
    """Logits `[B, T, V]` of each token of given answers; arguments and errors as for `score`.

    Through the caches, as they are in decoding: what these hold in eight bits is read so.
    """
    answer_BT, answer_lengths_B = _arrays(answer_BT, answer_lengths_B)
    _check_rows("answer", answer_BT, answer_lengths_B, model.config.vocab_size)
    length = answer_BT.shape[1]
    start = begin(model, prompt_BP, lengths_B, length, bos_id=bos_id)
    answer_BT, answer_lengths_B = as_int32(answer_BT), as_int32(answer_lengths_B)
    inputs_BT = jnp.concatenate([start.last[:, None], answer_BT[:, :-1]], axis=1)
    if isinstance(model, EncoderDecoder):
        logits_BTV, _ = model.prefill(inputs_BT, start.cache, start.cross, answer_lengths_B)
    else:
        logits_BTV, _ = model.prefill(inputs_BT, start.cache, answer_lengths_B)
    return logits_BTV


def left_aligned(x: Array, lengths_B: Array) -> Array:
    """Rows padded on the left, as other libraries make them, padded on the right, as here.

    Args:
      x: `[B, P, ...]`: prompts of ids, or vectors in front of an `Attention`, each row's real ones
        last.
      lengths_B: `[B]`, how many of the `P` are real.

    Returns:
      `x` with each row's real ones first, and its padding behind them.

    Raises:
      ValueError: shapes that do not fit, or a length that is not from 0 to `P`. Of lengths that are
        traced, what takes the rows looks after them.
    """
    if x.ndim < 2 or lengths_B.shape != x.shape[:1]:
        raise ValueError(
            f"x must be [B, P, ...] and lengths_B [B], not {list(x.shape)} and "
            f"{list(lengths_B.shape)}"
        )
    length = x.shape[1]
    for row, real in enumerate(known_values(lengths_B)):
        check_integer(f"lengths_B[{row}]", real, least=0, most=length)
    from_BP = (jnp.arange(length)[None] - jnp.asarray(lengths_B)[:, None]) % length
    return jnp.take_along_axis(x, jnp.expand_dims(from_BP, tuple(range(2, x.ndim))), axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Start:
    """Where a search begins.

    Attributes:
      last: `[B]` int32, the token that the search feeds to the model first.
      cache: what comes before it.
      cross: a translation's source, for each decoder layer; none for a language model.
      known: `[B, ...]` and `[B]`, all tokens that the decoder has been given, `last` included,
        padded on the right; None: `last` alone.
    """

    last: Array
    cache: tuple[SelfCache, ...]
    cross: tuple[CrossCache, ...]
    known: tuple[Array, Array] | None


def begin(
    model: Model,
    prompt_BP: Array,
    lengths_B: Array,
    max_new_tokens: int,
    *,
    bos_id: int,
    prefix: tuple[Array, Array] | None = None,
) -> Start:
    """Encodes a source, or prefills a prompt, with room for `L` tokens behind; see `generate`."""
    vocab_size = model.config.vocab_size
    prompt_BP, lengths_B = _arrays(prompt_BP, lengths_B)
    _check_rows("prompt", prompt_BP, lengths_B, vocab_size)
    check_token("bos_id", bos_id, vocab_size)
    prompt_BP, lengths_B = as_int32(prompt_BP), as_int32(lengths_B)
    batch, prompt_length = prompt_BP.shape
    cross: tuple[CrossCache, ...] = ()
    known: tuple[Array, Array] | None = None
    if isinstance(model, EncoderDecoder):
        cross = model.init_cross_cache(prompt_BP, lengths_B)
        last_B = jnp.full(batch, bos_id, jnp.int32)
        if prefix is None:
            cache = model.init_cache(batch, max_new_tokens)
        else:
            prefix_BF, prefix_lengths_B = _arrays(*prefix)
            _check_rows("prefix", prefix_BF, prefix_lengths_B, vocab_size, batch, least=0)
            before_BF = jnp.concatenate([last_B[:, None], as_int32(prefix_BF)], axis=1)
            known = (before_BF, as_int32(prefix_lengths_B) + 1)
            cache = model.init_cache(batch, max_new_tokens + before_BF.shape[1] - 1)
            _, cache = model.prefill(before_BF, cache, cross, known[1] - 1)
    else:
        if prefix is not None:
            raise ValueError("prefix is for translations: a language model continues its prompt")
        # The last token of a prompt is the first one that the search feeds to the model.
        cache = model.init_cache(batch, prompt_length + max_new_tokens)
        _, cache = model.prefill(prompt_BP, cache, lengths_B - 1)
        known = (prompt_BP, lengths_B)
    # An id that the model does not have, so that nothing plausible is decoded.
    is_length_B = (lengths_B >= 1) & (lengths_B <= prompt_length)
    if known is not None:
        tokens, known_lengths_B = known
        last_B = jnp.take_along_axis(tokens, known_lengths_B[:, None] - 1, axis=1)[:, 0]
        is_length_B &= (known_lengths_B >= 1) & (known_lengths_B <= tokens.shape[1])
    last_B = jnp.where(is_length_B, last_B, vocab_size)
    return Start(last_B, cache, cross, known)


def step_of(model: Model, start: Start) -> StepFn[tuple[SelfCache, ...]]:
    """What a search asks for logits."""
    if isinstance(model, EncoderDecoder):
        return functools.partial(_translate_step, model, start.cross)
    return model.decode


def told(search: Search, start: Start) -> dict[str, Any]:
    """What a search is told for its rules, if it asks for that."""
    parameters = inspect.signature(search).parameters.values()
    asks = any(p.name == "prompt" or p.kind == p.VAR_KEYWORD for p in parameters)
    return {"prompt": start.known} if asks and start.known is not None else {}


def _arrays(*given: Any) -> tuple[Any, ...]:
    return tuple(x if isinstance(x, Array) else np.asarray(x) for x in given)


def _check_rows(
    name: str,
    tokens: Array,
    lengths_B: Array,
    vocab_size: int,
    batch: int | None = None,
    least: int = 1,
) -> None:
    """Raises ValueError unless they are ids padded on the right, and how many are real."""
    ids_name = f"{name}_B{dict(prompt='P', answer='T', prefix='F')[name]}"
    lengths_name = "lengths_B" if name == "prompt" else f"{name}_lengths_B"
    shape = np.shape(tokens)
    is_batch = batch is None or shape[:1] == (batch,)
    if len(shape) != 2 or not all(shape) or np.shape(lengths_B) != shape[:1] or not is_batch:
        rows = "B" if batch is None else batch
        raise ValueError(
            f"{ids_name} must be [{rows}, {ids_name[-1]}] and {lengths_name} [{rows}], with a "
            f"token at least, not {list(shape)} and {list(np.shape(lengths_B))}"
        )
    for array_name, array in ((ids_name, tokens), (lengths_name, lengths_B)):
        if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
            raise ValueError(f"{array_name} must be integers, not {jnp.result_type(array)}")
    ids = known_values(tokens)
    for row, length in enumerate(known_values(lengths_B)):
        check_integer(f"{lengths_name}[{row}]", length, least=least, most=shape[1])
        # What is behind a prompt is of no concern.
        for at, id in enumerate(ids[row * shape[1] :][:length]):
            check_token(f"{ids_name}[{row}, {at}]", id, vocab_size)


def _translate_step(
    model: EncoderDecoder,
    cross: tuple[CrossCache, ...],
    tokens_R: Array,
    cache: tuple[SelfCache, ...],
) -> tuple[Array, tuple[SelfCache, ...]]:
    return model.decode(tokens_R, cache, cross)
