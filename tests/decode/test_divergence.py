"""How far predictions are from another model's, beside sums in float64 of each row alone."""

import dataclasses

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
    num_layers=2,
    num_heads=4,
    num_kv_heads=1,
    head_dim=4,
    max_length=12,
    window=4,
)
PROMPTS = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12], [13]]
ANSWERS = [[5, 1], [2, 20, 19, 18, 1], [1], [22, 21, 1], [4, 4, 4, 1]]


def log_p(model, prompt, answer):
    """Without caches, padding or other rows, which change nothing while all are of floats."""
    if isinstance(model, EncoderDecoder):
        logits = model(jnp.array([prompt]), jnp.array([[2, *answer[:-1]]]))
    else:
        logits = model(jnp.array([[*prompt, *answer[:-1]]]))
    logits = np.asarray(logits[0], np.float64)[-len(answer) :]
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


@pytest.mark.parametrize("cls", [EncoderDecoder, DecoderOnly])
def test_sums_over_the_tokens_of_the_answers(cls):
    first = cls(CONFIG, rngs=nnx.Rngs(0))
    models = [first, cls(CONFIG, rngs=nnx.Rngs(1)), quantize(first, "int8")]
    found = divergences(models, PROMPTS, ANSWERS, bos_id=2, batch_size=2)
    count = sum(map(len, ANSWERS))
    for model, own in zip(models, found, strict=True):
        far = agreed = loss = 0.0
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
            p, q = log_p(first, prompt, answer), log_p(model, prompt, answer)
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
