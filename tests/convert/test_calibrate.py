"""What attention's keys and values are made of: what they are is right, what is hidden is left out,
and merges that know it lose less of that text."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mqa_jax import DecoderOnly, EncoderDecoder, TransformerConfig
from mqa_jax.convert import convert_attention, convert_heads, input_moments
from mqa_jax.convert.calibrate import batches_of
from mqa_jax.convert.heads import attentions
from mqa_jax.convert.merges import truncated

SIZES = dict(vocab_size=31, d_model=22, d_ff=13, num_layers=2, num_heads=6, num_kv_heads=6)
SIZES |= dict(head_dim=4, max_length=17)
KINDS = {
    "plain": dict(),
    "rope": dict(positions="rope"),
    "bias": dict(bias=("qkv", "out"), block="post"),
    "window": dict(window=3, remat=True),
}
TEXTS = [[3, 9, 27, 1, 2, 5, 11], [8, 7], [4, 2, 2, 30, 19, 6, 1, 0, 12, 13, 5, 5]]
ANSWERS = [[5, 1], [22, 3, 4, 4, 9, 30], [7, 7, 1]]


def model_of(kind, model_type=EncoderDecoder):
    """With structure in its inputs: some directions of them are far larger than others."""
    model = model_type(TransformerConfig(**SIZES, **KINDS[kind]), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for place in attentions(model):
        norm = getattr(place.layer, f"{place.name}_norm")
        scale = np.geomspace(0.05, 5, norm.scale.shape[0])
        norm.scale[...] = jnp.asarray(rng.permutation(scale), jnp.float32)
        for name in ("key_bias", "value_bias"):
            if (bias := getattr(place.attention, name)) is not None:
                bias[...] = jnp.asarray(rng.normal(size=bias.shape), jnp.float32)
    return model


def test_moments_are_of_the_inputs_at_positions_that_are_seen():
    """By hand, from the first layers, sentence by sentence without any padding."""
    model = model_of("bias")
    found = input_moments(model, batches_of(model, TEXTS, ANSWERS, bos_id=2, batch_size=2))
    assert set(found) == {place.path for place in attentions(model)}
    encoder = decoder = cross = 0.0
    for source, answer in zip(TEXTS, ANSWERS, strict=True):
        x = model.encoder_embedder(jnp.array([source]), model.embedding, None, None)
        y = model.decoder.embedder(jnp.array([[2, *answer]]), model.embedding, None, None)
        memory = model.encode(jnp.array([source]))
        encoder, decoder, cross = (
            total + np.einsum("sd,se->de", *[with_one(array[0])] * 2)
            for total, array in ((encoder, x), (decoder, y), (cross, memory))
        )
    for path, expected in (
        ("encoder_layers.0.attention", encoder),
        ("decoder.layers.0.attention", decoder),
        ("decoder.layers.1.cross_attention", cross),
    ):
        assert found[path].dtype == np.float64
        np.testing.assert_allclose(found[path], expected, rtol=1e-4, atol=1e-4, err_msg=path)


def with_one(array):
    array = np.asarray(array, np.float64)
    return np.concatenate([array, np.ones((len(array), 1))], axis=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_however_texts_are_batched(kind):
    model = model_of(kind, DecoderOnly)
    one, all_together = (
        input_moments(model, batches_of(model, TEXTS, batch_size=size)) for size in (1, 3)
    )
    for path, moment in one.items():
        np.testing.assert_allclose(moment, all_together[path], rtol=1e-4, atol=1e-4)


def test_what_no_query_sees_is_left_out():
    """Of a memory only what the mask shows, not a sentence that no target asks for."""
    model = model_of("plain")
    batch = next(batches_of(model, TEXTS[:1], ANSWERS[:1]))
    two = {name: array.copy() for name, array in batch.items()}
    two["source_tokens_BS"][0, 10:14] = 9
    two["source_segment_ids"][0, 10:14] = 2
    was, now = (input_moments(model, [each]) for each in (batch, two))
    for path, moment in was.items():
        if "encoder" in path:
            assert not np.allclose(moment, now[path], rtol=1e-2)
        else:
            np.testing.assert_allclose(moment, now[path], rtol=1e-4, atol=1e-5)


def test_texts_that_are_too_long_are_cut():
    model = model_of("plain", DecoderOnly)
    (batch,) = batches_of(model, [list(range(30))])
    assert batch["inputs_BT"].shape == (1, 17) and batch["segment_ids"].all()
    with pytest.raises(ValueError, match="no text to calibrate with"):
        input_moments(model, [])


@pytest.mark.parametrize("kind", ["plain", "rope", "bias"])
def test_on_its_text_a_merge_that_knows_it_loses_less(kind):
    """Of what the heads of each group make of the text, in squares (Eckart and Young)."""
    model, path = model_of(kind), "encoder_layers.0.attention"
    batches = list(batches_of(model, TEXTS, ANSWERS))
    moment = input_moments(model, batches)[path]
    layer = model.encoder_layers[0]
    wide = layer.attention
    inputs = []
    for text in TEXTS:
        x = model.encoder_embedder(jnp.array([text]), model.embedding, None, None)
        inputs.append(with_one((x if kind == "bias" else layer.attention_norm(x))[0]))
    x_SD = np.concatenate(inputs)

    def heads(attention, name):
        """Of `[x, 1]`."""
        weight, bias = getattr(attention, name)[...], getattr(attention, f"{name}_bias")
        bias = np.zeros(weight.shape[:2]) if bias is None else bias[...]
        return np.concatenate([weight, np.asarray(bias)[..., None]], axis=-1)

    losses = []
    for options in ({}, dict(moment=moment)):
        taken = []

        def recorded(heads, taken=taken):
            taken.append(truncated(heads))
            return taken[-1]

        narrow = convert_attention(wide, 2, merge=recorded, **options)
        # With a rope a key's pairs are merged by themselves.
        names = ["value"] if kind == "rope" else ["key", "value"]
        turns = np.stack([turns for _, turns in taken[-2 * len(names) :]])
        loss = []
        for name, turns_KMHH in zip(names, np.split(turns, len(names)), strict=True):
            had = (heads(wide, name) @ x_SD.T).reshape(2, 3, 4, -1)
            now = turns_KMHH @ (heads(narrow, name) @ x_SD.T)[:, None]
            loss += [np.sum((had[k] - now[k]) ** 2) for k in range(2)]
        losses.append(np.array(loss))
    assert (losses[1] < 0.95 * losses[0]).all()


def test_moments_of_another_model_are_refused():
    model = model_of("plain")
    other = model_of("plain", DecoderOnly)
    moments = input_moments(other, batches_of(other, TEXTS))
    with pytest.raises(ValueError, match="not the model's attentions"):
        convert_heads(model, 1, moments=moments)


def test_texts_that_a_model_cannot_read_are_refused():
    """Before anything is computed, and none is left out in silence."""
    translates, continues = (model_of("plain", cls) for cls in (EncoderDecoder, DecoderOnly))
    with pytest.raises(ValueError, match="there are 1 answers for 2 prompts"):
        batches_of(translates, [[1], [2]], [[3]])
    with pytest.raises(ValueError, match="a DecoderOnly reads prompts alone, not answers"):
        batches_of(continues, [[1], [2]], [[3], [4]])
    for prompts, answers, where in (
        ([[1], [2, 99]], [[3], [4]], "prompt 1 has the id 99"),
        ([[1], [2]], [[3], [-1]], "answer 1 has the id -1"),
    ):
        with pytest.raises(ValueError, match=where):
            batches_of(translates, prompts, answers)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        batches_of(continues, [[1]], batch_size=0)
