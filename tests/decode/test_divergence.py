"""How far predictions are from another model's, beside sums in float64 of each row alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mqa_jax import DecoderOnly, EncoderDecoder, TransformerConfig
from mqa_jax.convert import quantize
from mqa_jax.decode.divergence import divergences

CONFIG = TransformerConfig(
    vocab_size=23,
    d_model=16,
    d_ff=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=1,
    head_dim=4,
    max_length=12,
    window=4,
)
PROMPTS = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12], [13]]
ANSWERS = [[5, 1], [2, 20, 19, 18, 1], [1], [22, 21, 1], [4, 4, 4, 1]]


def padded(rows):
    """On the right, where nothing that counts sees it."""
    return np.array([[*row, *[0] * (CONFIG.max_length - len(row))] for row in rows], np.int32)


def log_p(model):
    """`[T, V]` of each answer, in float64, from the full pass, without caches."""
    if isinstance(model, EncoderDecoder):
        is_token = padded([[1] * len(prompt) for prompt in PROMPTS])
        inputs = padded(PROMPTS), padded([[2, *answer[:-1]] for answer in ANSWERS])
        segments = dict(source_segment_ids=is_token, target_segment_ids=np.ones_like(inputs[1]))
        logits = jax.jit(model.__call__)(*inputs, **segments)
        starts = [0] * len(ANSWERS)
    else:
        rows = [[*prompt, *answer[:-1]] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
        logits = jax.jit(model.__call__)(padded(rows))
        starts = [len(prompt) - 1 for prompt in PROMPTS]
    logits = np.asarray(logits, np.float64)
    logits -= np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return [
        row[start : start + len(answer)]
        for row, start, answer in zip(logits, starts, ANSWERS, strict=True)
    ]


@pytest.mark.parametrize("cls", [EncoderDecoder, DecoderOnly])
def test_sums_over_the_tokens_of_the_answers(cls):
    first = cls(CONFIG, rngs=nnx.Rngs(0))
    models = [first, cls(CONFIG, rngs=nnx.Rngs(1)), quantize(first, "int8")]
    found = divergences(models, PROMPTS, ANSWERS, bos_id=2, batch_size=2)
    wanted, count = log_p(first), sum(map(len, ANSWERS))
    for model, own in zip(models, found, strict=True):
        far = agreed = loss = 0.0
        for p, q, answer in zip(wanted, log_p(model), ANSWERS, strict=True):
            far += np.sum(np.exp(p) * (p - q))
            agreed += np.sum(p.argmax(axis=-1) == q.argmax(axis=-1))
            loss -= q[np.arange(len(answer)), answer].sum()
        assert own.tokens == count
        np.testing.assert_allclose(own.nats, far / count, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(own.agreement, agreed / count)
        np.testing.assert_allclose(own.loss, loss / count, rtol=1e-5)
        np.testing.assert_allclose(own.perplexity, np.exp(loss / count), rtol=1e-5)
    assert found[0].nats < 1e-7 < found[2].nats < 0.1 * found[1].nats and found[1].agreement < 1


def test_what_caches_round_counts():
    model = DecoderOnly(dataclasses.replace(CONFIG, window=None), rngs=nnx.Rngs(0))
    models = [model, quantize(model, None, cache_dtype="int8")]
    _, found = divergences(models, PROMPTS, ANSWERS, bos_id=2, batch_size=5)
    assert 1e-9 < found.nats < 1e-2


def test_texts_that_cannot_be_compared():
    model = DecoderOnly(CONFIG, rngs=nnx.Rngs(0))
    options = dict(bos_id=2, batch_size=2)
    with pytest.raises(ValueError, match="no text to compare"):
        divergences([model], [], [], **options)
    with pytest.raises(ValueError, match="line 1 has 3 tokens and its answer 10"):
        divergences([model], [[3, 4, 5]], [[1] * 10], name="line {}".format, **options)
    model.decoder.layers[0].attention.query[...] *= jnp.nan
    with pytest.raises(ValueError, match="logits that are no numbers"):
        divergences([model], PROMPTS, ANSWERS, **options)
