"""Whole models in eight bits: what they compute, what they weigh, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mqa_jax import (
    DecoderOnly,
    EncoderDecoder,
    Generator,
    ShardingRules,
    TransformerConfig,
    beam_search,
    greedy,
    make_mesh,
)
from mqa_jax.convert import convert_heads, quantize
from mqa_jax.core.quantized import SCHEMES, QuantizedWeight

CONFIG = TransformerConfig(
    vocab_size=37,
    d_model=24,
    d_ff=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_length=16,
    bias=("qkv", "mlp"),
    gated=True,
    tied_softmax=False,
)
MODELS = [EncoderDecoder, DecoderOnly]


def build(cls, **changes):
    return cls(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def logits_of(model):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 37, (2, 7)), jnp.int32)
    args = (ids, ids[:, ::-1]) if isinstance(model, EncoderDecoder) else (ids,)
    return np.asarray(jax.jit(lambda *args: model(*args))(*args))


def widened(model):
    """The model with floats in the places of what is quantized, and that config."""
    found = nnx.clone(model)
    for _, module in list(nnx.iter_modules(found)):
        for name, weight in list(vars(module).items()):
            if isinstance(weight, QuantizedWeight):
                setattr(module, name, nnx.Param(weight[...].widened()))
    return found


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_model_is_the_model_to_eight_bits(cls, scheme):
    model = build(cls)
    before = jax.tree.map(np.asarray, nnx.state(model))
    quantized = quantize(model, scheme)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    logits, near = logits_of(model), logits_of(quantized)
    distance = np.max(np.abs(near - logits)) / np.std(logits)
    assert 0 < distance < (0.4 if scheme == "fp8" else 0.15), distance
    # What is added, and norms, are left as they are.
    embedder, layer = quantized.decoder.embedder, quantized.decoder.layers[0]
    for left in (embedder.positions.table, layer.attention_norm.scale, layer.attention.key_bias):
        assert isinstance(left, nnx.Param) and left.dtype == jnp.float32
    kept, rounded = logits_of(widened(quantized)), near
    if scheme == "int8_weights":
        np.testing.assert_allclose(rounded, kept, rtol=1e-4, atol=1e-4)
    else:
        assert np.max(np.abs(rounded - kept)) > 1e-3
    states = [jax.tree.leaves(nnx.state(each)) for each in (model, quantized)]
    sizes = [sum(x.nbytes for x in leaves) for leaves in states]
    assert sizes[1] < 0.45 * sizes[0]
    # The config builds the same.
    again = nnx.eval_shape(lambda: cls(quantized.config, rngs=nnx.Rngs(0)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(again)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), nnx.state(quantized)
    )


@pytest.mark.parametrize("cls", MODELS)
def test_a_generator_decodes_with_eight_bits(cls):
    """And reads its weights in eight bits, whatever dtype the activations are of."""
    model = quantize(build(cls, dtype="bfloat16"), "int8", cache_dtype="int8")
    params, seen = nnx.state(model), set()

    def search(step_fn, *args, **options):
        owner = step_fn.args[0] if hasattr(step_fn, "args") else step_fn.__self__
        seen.update(x.dtype for x in jax.tree.leaves(nnx.state(owner)) if x.ndim > 2)
        seen.update(x.dtype for x in jax.tree.leaves(args[0]) if x.ndim == 4)
        return greedy(step_fn, *args, eos_id=1, **options)

    options = dict(batch_size=2, bos_id=0, max_new_tokens=4)
    prompts = [[5, 9, 3], [7]]
    whole = Generator(model, search=search, **options).tokens(params, prompts)
    assert seen == {jnp.dtype(jnp.int8)}
    in_parts = Generator(model, search=functools.partial(greedy, eos_id=1), **options)
    streamed = [[], []]
    for i, ids, _ in in_parts.stream(params, prompts, every=2):
        streamed[i] += ids
    assert streamed == whole
    search = functools.partial(beam_search, eos_id=1, beam_size=3)
    assert all(Generator(model, search=search, **options).tokens(params, prompts))


@pytest.mark.parametrize("cls", MODELS)
def test_weights_are_split_as_wide_ones_are(cls):
    model = build(cls, vocab_size=40)
    quantized = quantize(model, "int8_weights")
    mesh, rules = make_mesh(2, 2, 2), ShardingRules()
    shardings = nnx.as_pure(rules.params(mesh, nnx.state(quantized)))
    wide = dict(leaves(nnx.as_pure(rules.params(mesh, nnx.state(model)))))
    for path, sharding in leaves(shardings):
        whole = wide[path.removesuffix("/values").removesuffix("/scales")].spec
        kept = len(whole) if not path.endswith("/scales") else len(sharding.spec)
        assert tuple(sharding.spec) == tuple(whole)[:kept]
    state = jax.device_put(nnx.as_pure(nnx.state(quantized)), shardings)
    placed = nnx.merge(nnx.graphdef(quantized), state)
    np.testing.assert_allclose(logits_of(placed), logits_of(quantized), rtol=1e-4, atol=1e-5)


def leaves(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in found]


def test_what_is_refused():
    model = build(DecoderOnly)
    with pytest.raises(ValueError, match="scheme 'int4' is not one of int8, int8_weights, fp8"):
        quantize(model, "int4")
    with pytest.raises(ValueError, match="quantized 'int4' is not one of None, int8"):
        dataclasses.replace(CONFIG, quantized="int4")
    with pytest.raises(ValueError, match="cache_dtype must be .* int8 or fp8, not 'int4'"):
        quantize(model, None, cache_dtype="int4")
    with pytest.raises(ValueError, match="a Rngs is neither"):
        quantize(nnx.Rngs(0), "int8")
    quantized = quantize(model, "int8")
    with pytest.raises(ValueError, match=r"quantized already \(int8\)"):
        quantize(quantized, "int8")
    with pytest.raises(ValueError, match="weights are in eight bits"):
        convert_heads(quantized, 1)
    model.decoder.layers[0].feed_forward.wi[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"FD\[40, 24\] has numbers that are not finite"):
        quantize(model, "int8")
