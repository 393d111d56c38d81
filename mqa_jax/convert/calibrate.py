"""What keys and values are made of when a model reads a text, for merges that are right about that.

Array letters:
  B batch   T query length   S key/value length   D inputs, and 1 where there are biases
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mqa_jax.attention import Attention, causal_mask
from mqa_jax.convert.heads import attentions
from mqa_jax.core.checks import check_integer
from mqa_jax.model.transformer import EncoderDecoder, Model

BUCKET = 16  # Rows are padded to a multiple, so that a text needs a handful of compilations.


def input_moments(model: Model, batches: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The second moments of what each attention makes keys and values of.

    Args:
      model: any.
      batches: the arguments of the model's calls, by name, such as `batches_of` gives them.

    Returns:
      for each attention, by its path in the model such as `decoder.layers.0.cross_attention`, the
      sum of the outer products of its inputs at all positions that some query sees, `[D, D]`
      float64; of `[x, 1]` where its products have biases.

    Raises:
      ValueError: there is no batch.
    """
    graphdef, params = nnx.split(model)

    @jax.jit
    def moments(params: nnx.State, batch: dict[str, Any]) -> dict[str, Array]:
        found: dict[str, Array] = {}
        watched = nnx.merge(graphdef, params)
        # What a layer that is computed again has seen could not be brought out of it.
        watched.config = watched.decoder.config = dataclasses.replace(model.config, remat=False)
        for _, path, layer, name in attentions(watched):
            setattr(layer, name, _Watched(getattr(layer, name), _keeper(found, path)))
        watched(**batch)
        return found

    sums: dict[str, np.ndarray] = {}
    for batch in batches:
        for path, moment in moments(params, dict(batch)).items():
            sums[path] = sums.get(path, 0.0) + np.asarray(moment, np.float64)
    if not sums:
        raise ValueError("there is no text to calibrate with")
    return sums


def batches_of(
    model: Model,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]] | None = None,
    *,
    bos_id: int = 0,
    batch_size: int = 8,
) -> Iterator[dict[str, Any]]:
    """Texts as arguments of a model's calls, those of like length together.

    Args:
      model: of which task it is decides.
      prompts: ids of a language model's texts, or of sources; what is longer than the model knows
        positions for is cut.
      answers: of translations, the ids of each one's target, without `bos_id`; the sources
        themselves when None.
      bos_id: what a target begins with.
      batch_size: rows at a time.

    Raises:
      ValueError: answers for a model that has none, or not one for each prompt; an id that the
        model has no vector for.
    """
    check_integer("batch_size", batch_size)
    if answers is not None:
        if not isinstance(model, EncoderDecoder):
            raise ValueError(
                f"a {type(model).__name__} reads prompts alone, not answers: put them behind these"
            )
        if len(answers) != len(prompts):
            raise ValueError(f"there are {len(answers)} answers for {len(prompts)} prompts")
    vocab_size = model.config.vocab_size
    for what, texts in (("prompt", prompts), ("answer", answers or []), ("bos_id", [[bos_id]])):
        for i, ids in enumerate(texts):
            if outside := [id for id in ids if not 0 <= id < vocab_size]:
                where = what if what == "bos_id" else f"{what} {i}"
                raise ValueError(f"{where} has the id {outside[0]}, of {vocab_size} that there are")
    return _batches_of(model, prompts, answers or prompts, bos_id, batch_size)


def _batches_of(
    model: Model,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    bos_id: int,
    batch_size: int,
) -> Iterator[dict[str, Any]]:
    longest = model.config.max_length
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids_BT, segments_BT = _padded([prompts[i] for i in rows], longest)
        if isinstance(model, EncoderDecoder):
            targets = [[bos_id, *answers[i]] for i in rows]
            target_BT, target_segments_BT = _padded(targets, longest)
            yield dict(
                source_tokens_BS=ids_BT,
                source_segment_ids=segments_BT,
                target_inputs_BT=target_BT,
                target_segment_ids=target_segments_BT,
            )
        else:
            yield dict(inputs_BT=ids_BT, segment_ids=segments_BT)


def _padded(rows: Sequence[Sequence[int]], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and the segments of a sentence a row."""
    width = min(longest, -(-max(map(len, rows)) // BUCKET) * BUCKET)
    ids_BT = np.zeros((len(rows), width), np.int32)
    segments_BT = np.zeros_like(ids_BT)
    for i, row in enumerate(rows):
        kept = list(row)[:width]
        ids_BT[i, : len(kept)] = kept
        segments_BT[i, : len(kept)] = 1
    return ids_BT, segments_BT


class _Watched(nnx.Module):
    """An attention that tells of its inputs."""

    def __init__(self, attention: Attention, tell: Callable[[Array], None]):
        self.attention, self.tell = attention, tell

    def __call__(self, x_BTD: Array, memory_BSD: Array | None = None, **options: Any) -> Array:
        source_BSD = x_BTD if memory_BSD is None else memory_BSD
        mask, length = options.get("mask"), x_BTD.shape[1]
        if mask is not None and memory_BSD is None:
            positions = jnp.arange(length)[None]
            is_causal = options.get("is_causal") or self.attention.window is not None
            if is_causal:
                mask = mask & causal_mask(positions, positions, self.attention.window)
        # Without a mask a token sees itself at least, and a memory is seen whole.
        seen_BS = jnp.ones(source_BSD.shape[:2], bool)
        if mask is not None:
            seen_BS = jnp.broadcast_to(jnp.any(mask, axis=(1, 2)), seen_BS.shape)
        source_BSD = jnp.where(seen_BS[..., None], source_BSD.astype(jnp.float32), 0.0)
        if self.attention.key_bias is not None:
            ones_BS1 = seen_BS[..., None].astype(jnp.float32)
            source_BSD = jnp.concatenate([source_BSD, ones_BS1], axis=-1)
        self.tell(jnp.einsum("BSd,BSD->dD", source_BSD, source_BSD, precision="highest"))
        return self.attention(x_BTD, memory_BSD, **options)


def _keeper(found: dict[str, Array], path: str) -> Callable[[Array], None]:
    def keep(moment: Array) -> None:
        found[path] = moment

    return keep
