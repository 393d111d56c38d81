"""The mesh, the rules, and that a sharded model computes what one on a single device does."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from mqa_jax import Attention, DecoderOnly, EncoderDecoder, TransformerConfig, beam_search, greedy
from mqa_jax.core.sharding import MESH_AXES, ShardingRules, make_mesh, on_mesh
from mqa_jax.decode.rules import Forbid, MinNewTokens, NoRepeatNgram, RepetitionPenalty

CONFIG = TransformerConfig(
    vocab_size=40,
    d_model=16,
    d_ff=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=1,
    head_dim=6,
    max_length=11,
)


def explicit_mesh(*sizes):
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * 3)


def test_mesh_takes_what_is_left_for_minus_one():
    assert dict(make_mesh(data=-1, fsdp=2).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(make_mesh(1, 1, 8).shape) == {"data": 1, "fsdp": 1, "tensor": 8}


@pytest.mark.parametrize(
    "sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (8, 2, 1), (-1, 0, 1)]
)
def test_mesh_that_does_not_use_all_devices_is_refused(sizes):
    data, fsdp, tensor = sizes
    with pytest.raises(ValueError, match=f"data={data}, fsdp={fsdp}, tensor={tensor}.* 8 devices"):
        make_mesh(*sizes)


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        ("NHD", (4, 6, 16), PartitionSpec("tensor", None, "fsdp")),
        ("KHD", (2, 6, 16), PartitionSpec("tensor", None, "fsdp")),
        ("KHD", (1, 6, 16), PartitionSpec(None, None, "fsdp")),
        ("DNH", (16, 4, 6), PartitionSpec("fsdp", "tensor", None)),
        ("FD", (24, 16), PartitionSpec("tensor", "fsdp")),
        ("VD", (40, 16), PartitionSpec("tensor", "fsdp")),
        ("PD", (11, 16), PartitionSpec(None, "fsdp")),
        ("BT", (8, 5), PartitionSpec(("data", "fsdp"), None)),
    ],
)
def test_rules_turn_letters_into_mesh_axes(axes, shape, spec):
    mesh = make_mesh(2, 2, 2)
    sharding = ShardingRules().sharding(mesh, axes, shape)
    expected = jax.sharding.NamedSharding(mesh, spec)
    assert sharding.is_equivalent_to(expected, len(shape))


def test_an_axis_that_does_not_divide_is_refused_by_name_and_size():
    with pytest.raises(ValueError, match=r"axis F of FD\(25, 16\) has size 25, which the 2 parts"):
        ShardingRules().sharding(make_mesh(2, 2, 2), "FD", (25, 16))


@pytest.mark.parametrize("size", [2.0, "2", True, -2])
def test_a_size_of_a_mesh_axis_is_an_integer(size):
    with pytest.raises(ValueError, match=f"fsdp must be .*{size!r}"):
        make_mesh(-1, size)


def test_a_mesh_with_axes_of_other_names_needs_rules_that_name_them():
    mesh = jax.make_mesh((4, 2), ("rows", "model"), axis_types=(AxisType.Auto,) * 2)
    lacking = r"has the axes \('rows', 'model'\) and lacks \['data', 'fsdp', 'tensor'\].*B=\('rows'"
    with pytest.raises(ValueError, match=lacking):
        ShardingRules().sharding(mesh, "FD", (24, 16))
    model = ("model",)
    rules = ShardingRules(B=("rows",), D=(), N=model, K=model, F=model, V=model)
    assert rules.sharding(mesh, "FD", (24, 16)).spec == PartitionSpec("model", None)
    assert rules.sharding(mesh, "BT", (8, 3)).spec == PartitionSpec("rows", None)


@pytest.mark.parametrize("names", ["data", ["data"], None, (2,), ("data", None)])
def test_a_rule_is_a_tuple_of_names(names):
    with pytest.raises(ValueError, match=r"the rule B=.* must be a tuple of names"):
        ShardingRules(B=names)


def test_no_mesh_axis_is_named_twice():
    with pytest.raises(ValueError, match=r"the rule B=\('data', 'data'\) names a mesh axis twice"):
        ShardingRules(B=("data", "data"))
    mesh = make_mesh(2, 2, 2)
    with pytest.raises(ValueError, match=r"\['tensor'\] would split two axes of NHD\(4, 6, 16\)"):
        ShardingRules(D=("tensor",)).sharding(mesh, "NHD", (4, 6, 16))
    with pytest.raises(ValueError, match=r"\['fsdp'\] would split two axes of DD\(16, 16\)"):
        ShardingRules().sharding(mesh, "DD", (16, 16))


@pytest.mark.parametrize("axes", ["F", "FDH", "F_", ""])
def test_a_letter_for_each_axis(axes):
    with pytest.raises(ValueError, match="is not a letter for each axis of the shape"):
        ShardingRules().sharding(make_mesh(2, 2, 2), axes, (24, 16))


@pytest.mark.parametrize("make", [make_mesh, explicit_mesh])
def test_weights_are_born_where_they_belong(make):
    mesh = make(2, 2, 2)
    with on_mesh(mesh, ShardingRules()):
        model = DecoderOnly(CONFIG, rngs=nnx.Rngs(3))
    expected = ShardingRules().params(mesh, nnx.state(model))
    for weight, sharding in zip(*map(jax.tree.leaves, (nnx.state(model), expected)), strict=True):
        if weight.ndim > 1:  # Flax makes the norms, which lie on one device.
            assert weight.sharding.is_equivalent_to(sharding, weight.ndim)
    with on_mesh(mesh, ShardingRules()):
        logits = jax.jit(lambda model, x: model(x))(model, np.arange(8, dtype=np.int32)[:, None])
    one = DecoderOnly(CONFIG, rngs=nnx.Rngs(3))
    np.testing.assert_allclose(logits, one(np.arange(8)[:, None]), rtol=1e-5, atol=1e-5)


def test_every_large_weight_names_its_axes():
    state = nnx.state(nnx.eval_shape(lambda: DecoderOnly(CONFIG, rngs=nnx.Rngs(0))))
    variables = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert variables
    for variable in variables:
        assert len(variable.get_metadata()["axes"]) == len(variable.shape)


@pytest.mark.parametrize(
    ("make", "sizes", "num_kv_heads"),
    [
        pytest.param(make_mesh, (8, 1, 1), 1, marks=pytest.mark.slow),
        pytest.param(make_mesh, (1, 8, 1), 4, marks=pytest.mark.slow),
        (make_mesh, (2, 2, 2), 1),
        pytest.param(make_mesh, (2, 1, 4), 4, marks=pytest.mark.slow),
        pytest.param(explicit_mesh, (2, 2, 2), 1, marks=pytest.mark.slow),
        (explicit_mesh, (2, 2, 2), 4),
    ],
)
def test_a_sharded_model_computes_the_same(make, sizes, num_kv_heads):
    config = dataclasses.replace(CONFIG, num_kv_heads=num_kv_heads)
    model = DecoderOnly(config, rngs=nnx.Rngs(3))
    graphdef, params = nnx.split(model)
    tokens = jax.random.randint(jax.random.key(1), (8, 11), 0, 40)
    forward = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    expected = forward(params, tokens)

    mesh = make(*sizes)
    shardings = ShardingRules().params(mesh, params)
    sharded = jax.device_put(params, shardings)
    batch = jax.device_put(tokens, ShardingRules().sharding(mesh, "BT", tokens.shape))
    # Sums over a sharded axis are added in another order.
    np.testing.assert_allclose(forward(sharded, batch), expected, rtol=1e-5, atol=1e-5)

    query = nnx.merge(graphdef, sharded).decoder.layers[0].attention.query[...]
    assert query.addressable_shards[0].data.size == query.size // (sizes[1] * sizes[2])


def test_a_translation_on_explicit_axes_computes_the_same():
    """Both sides at once, as in training; logits are split by rows and by the vocabulary."""
    graphdef, params = nnx.split(EncoderDecoder(CONFIG, rngs=nnx.Rngs(3)))
    source, target = (jax.random.randint(jax.random.key(i), (8, 11), 0, 40) for i in (1, 2))
    forward = jax.jit(lambda params, *tokens: nnx.merge(graphdef, params)(*tokens))
    expected = forward(params, source, target)

    mesh, rules = explicit_mesh(2, 2, 2), ShardingRules()
    split = functools.partial(jax.device_put, device=rules.sharding(mesh, "BT", source.shape))
    logits = forward(
        jax.device_put(params, rules.params(mesh, params)), split(source), split(target)
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert jax.typeof(logits).sharding.spec == PartitionSpec(rules.B, None, "tensor")


@pytest.mark.parametrize(
    ("num_kv_heads", "sizes", "kv_heads_axis"),
    [
        (4, (2, 2, 2), "tensor"),
        (2, (2, 2, 2), "tensor"),
        (2, (1, 2, 4), None),
        (1, (2, 2, 2), None),
    ],
)
def test_attention_weights_split_and_key_value_heads_only_where_they_divide(
    num_kv_heads, sizes, kv_heads_axis
):
    attention = nnx.eval_shape(lambda: Attention(16, 4, num_kv_heads, 5, rngs=nnx.Rngs(0)))
    mesh = make_mesh(*sizes)
    specs = dict(
        query=PartitionSpec("tensor", None, "fsdp"),
        key=PartitionSpec(kv_heads_axis, None, "fsdp"),
        value=PartitionSpec(kv_heads_axis, None, "fsdp"),
        out=PartitionSpec("fsdp", "tensor", None),
    )
    shardings = dict(nnx.to_flat_state(ShardingRules().params(mesh, nnx.state(attention))))
    assert shardings.keys() == {(name,) for name in specs}
    for name, spec in specs.items():
        expected = jax.sharding.NamedSharding(mesh, spec)
        assert shardings[name,].get_value().is_equivalent_to(expected, 3)


def test_a_weight_without_axes_is_replicated_and_a_rule_can_be_changed():
    mesh = make_mesh(2, 2, 2)
    module = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    for variable in jax.tree.leaves(ShardingRules().params(mesh, nnx.state(module))):
        assert variable.spec == PartitionSpec()
    assert (
        ShardingRules(V=())
        .sharding(mesh, "VD", (13, 6))
        .is_equivalent_to(jax.sharding.NamedSharding(mesh, PartitionSpec(None, "fsdp")), 2)
    )


@pytest.mark.parametrize("make", [make_mesh, explicit_mesh])
def test_gradients_of_sharded_weights_are_the_same(make):
    attention = Attention(16, 4, 1, 5, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(attention)
    x = jax.random.normal(jax.random.key(1), (8, 7, 16))

    @jax.jit
    @jax.grad
    def gradient(params, x):
        return (nnx.merge(graphdef, params)(x, is_causal=True) ** 2).sum()

    mesh, rules = make(2, 2, 2), ShardingRules()
    sharded = jax.device_put(params, rules.params(mesh, params))
    batch = jax.device_put(x, rules.sharding(mesh, "BT", x.shape[:2]))
    # Sums over a sharded axis are added in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4, equal_nan=False)
    jax.tree.map(close, gradient(sharded, batch), gradient(params, x))


# What later models are made of, all of it in three of them.
LATER = {
    "rope": dict(
        positions="rope",
        num_kv_heads=2,
        qk_norm=True,
        bias=("qkv", "out", "mlp"),
        gated=True,
        activation="silu",
        block="sandwich",
        num_layers=2,
        window=(5, None),
        attention_softcap=1.0,
        logits_softcap=2.0,
    ),
    "relative": dict(
        positions="relative",
        relative_buckets=6,
        relative_distance=9,
        num_kv_heads=8,
        cross_kv_heads=1,
        norm="layer",
        block="post",
        bias=("logits",),
        tied_softmax=False,
    ),
    "parallel": dict(positions="sinusoidal", num_kv_heads=1, block="parallel", parallel_norms=2),
}
RULES = [RepetitionPenalty(1.3), NoRepeatNgram(2), MinNewTokens(3, 1), Forbid((7, (5, 6)))]


@pytest.mark.parametrize(
    ("model_type", "options", "make", "sizes"),
    [
        (DecoderOnly, dict(num_kv_heads=8), make_mesh, (2, 2, 2)),
        *(
            pytest.param(model_type, *setting, marks=pytest.mark.slow)
            for model_type, *setting in (
                (DecoderOnly, dict(num_kv_heads=1), explicit_mesh, (2, 2, 2)),
                (EncoderDecoder, dict(num_kv_heads=1), make_mesh, (1, 2, 4)),
                (DecoderOnly, LATER["rope"], explicit_mesh, (2, 2, 2)),
                (DecoderOnly, LATER["parallel"], explicit_mesh, (2, 2, 2)),
                (EncoderDecoder, LATER["relative"], explicit_mesh, (2, 2, 2)),
            )
        ),
    ],
)
def test_sharded_decoding_gives_the_same_tokens(model_type, options, make, sizes):
    config = dataclasses.replace(CONFIG, num_heads=8, max_length=16, **options)
    graphdef, params = nnx.split(model_type(config, rngs=nnx.Rngs(3)))
    is_later = "positions" in options
    source = jax.random.randint(jax.random.key(1), (8, 11), 2, 40)

    @functools.partial(jax.jit, static_argnums=2)
    def decode(params, source, search):
        model = nnx.merge(graphdef, params)
        cache, context = model.init_cache(8, 16), ()
        if model_type is EncoderDecoder:
            context = (model.init_cross_cache(source),)
        cache = model.prefill(source[:, :4], cache, *context)[1]
        decoded = search(
            lambda tokens, cache: model.decode(tokens, cache, *context),
            cache,
            source[:, 4],
            max_new_tokens=11,
            eos_id=1,
            **dict(rules=RULES, prompt=(source[:, :4], np.full(8, 4))) if is_later else {},
        )
        return decoded.tokens, decoded.length

    mesh, rules = make(*sizes), ShardingRules()
    sharded = jax.device_put(params, rules.params(mesh, params))
    batch = jax.device_put(source, rules.sharding(mesh, "BT", source.shape))
    for search in (greedy, functools.partial(beam_search, beam_size=3)):
        expected = decode(params, source, search)
        assert len(np.unique(expected[0])) > 5
        jax.tree.map(np.testing.assert_array_equal, decode(sharded, batch, search), expected)
