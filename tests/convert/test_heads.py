"""Fewer key/value heads: the same function where nothing is lost, else what a merge says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import IDS, TARGETS, write
from flax import nnx

import mqa_jax
from mqa_jax.attention.positions import Rope
from mqa_jax.convert import convert_attention, convert_heads
from mqa_jax.convert.merges import DEFAULT, MERGES, aligned, first, mean, truncated
from mqa_jax.decode.generate import Generator
from mqa_jax.decode.search import greedy
from mqa_jax.hub import load, save
from mqa_jax.model.transformer import EncoderDecoder

D, N, H, B, T = 11, 8, 6, 2, 7
X = np.random.default_rng(5).normal(size=(B, T, D)).astype(np.float32)
OPTIONS = {
    "plain": {},
    "rope": dict(rope=Rope(theta=50.0)),
    "bias": dict(qkv_bias=True, out_bias=True, window=3, softcap=2.0, scale=0.7),
    "rope_bias": dict(rope=Rope(theta=50.0), qkv_bias=True),
    "norm": dict(qk_norm=True, rope=Rope(theta=50.0)),
}
both = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_merge = pytest.mark.parametrize("name", MERGES)


def attention(num_kv_heads, seed=0, **options):
    """With weights everywhere, biases and scales too."""
    module = mqa_jax.Attention(D, N, num_kv_heads, H, **options, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for variable in jax.tree.leaves(nnx.state(module), is_leaf=lambda x: hasattr(x, "shape")):
        variable[...] = jnp.asarray(rng.normal(size=variable.shape), jnp.float32)
    return module


@jax.jit
def called(module):
    return module(jnp.asarray(X), is_causal=True)


def run(module):
    return np.asarray(called(module))


def repeated(narrow, count):
    """A module with every key/value head `count` times."""
    wide = nnx.clone(narrow)
    for name in ("key", "value", "key_bias", "value_bias"):
        if (weight := getattr(narrow, name)) is not None:
            setattr(wide, name, weight.replace(jnp.repeat(weight[...], count, axis=0)))
    return wide


def replaced(module, **weights):
    module = nnx.clone(module)
    for name, array in weights.items():
        own = getattr(module, name)
        setattr(module, name, own.replace(jnp.asarray(array, jnp.float32)))
    return module


def turn(rng, options):
    """A rotation of `H` dimensions that attention's logits cannot tell, if the queries turn too."""
    if "rope" not in options:
        return np.linalg.qr(rng.normal(size=(H, H)))[0]
    angles = rng.uniform(0, 2 * np.pi, H // 2)
    cos, sin = np.diag(np.cos(angles)), np.diag(np.sin(angles))
    return np.block([[cos, -sin], [sin, cos]])


@both
@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("name", ["mean", "first", "aligned", "truncated"])
def test_heads_that_are_alike_become_one_and_nothing_changes(options, kept, name):
    narrow = attention(kept, **options)
    wide = repeated(narrow, 4 // kept)
    merged = convert_attention(wide, kept, merge=MERGES[name]())
    assert merged.key.shape == narrow.key.shape
    np.testing.assert_allclose(run(merged), run(wide), rtol=2e-4, atol=2e-5)
    if name != "truncated":
        for path, weight in nnx.to_flat_state(nnx.state(merged)):
            own = dict(nnx.to_flat_state(nnx.state(narrow)))[path]
            np.testing.assert_allclose(weight[...], own[...], atol=1e-5)
    # The one that was given is as it was.
    assert wide.key.shape[0] == 4


@both
@every_merge
def test_as_many_heads_as_before_are_the_same_weights(options, name):
    module = attention(4, **options)
    same = convert_attention(module, 4, merge=MERGES[name]())
    jax.tree.map(np.testing.assert_array_equal, nnx.state(same), nnx.state(module))


@pytest.mark.parametrize("options", [OPTIONS[n] for n in ("plain", "rope", "bias", "rope_bias")])
@pytest.mark.parametrize("merge", [aligned, truncated])
def test_heads_that_are_turned_alike_are_found_to_be_alike(options, merge):
    narrow = attention(1, **options)
    wide, rng = repeated(narrow, 4), np.random.default_rng(3)
    names = ["key", "value", "query", "out"]
    names += ["key_bias", "value_bias", "query_bias"] if options.get("qkv_bias") else []
    weights = {name: np.array(getattr(wide, name)[...]) for name in names}
    for k in range(4):
        key_turn, value_turn = turn(rng, options), turn(rng, {})
        own = slice(k * N // 4, (k + 1) * N // 4)
        for name in ("key", "key_bias"):
            if name in weights:
                weights[name][k] = key_turn @ weights[name][k]
        for name in ("value", "value_bias"):
            if name in weights:
                weights[name][k] = value_turn @ weights[name][k]
        for name in ("query", "query_bias"):
            if name in weights:
                weights[name][own] = np.einsum("hH,nH...->nh...", key_turn, weights[name][own])
        weights["out"][:, own] = weights["out"][:, own] @ value_turn.T
    turned = replaced(wide, **weights)
    np.testing.assert_allclose(run(turned), run(wide), rtol=2e-4, atol=2e-5)
    merged = convert_attention(turned, 1, merge=merge)
    np.testing.assert_allclose(run(merged), run(wide), rtol=1e-3, atol=1e-4)
    pooled = convert_attention(turned, 1, merge=mean)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(run(pooled), run(wide), rtol=0.1)


@pytest.mark.parametrize("merge", MERGES)
def test_what_is_computed_is_what_the_merge_says(merge):
    """Of keys and values: heads `turns[m] @ merged` in place of those that there were."""
    wide, taken, own = attention(4, **OPTIONS["bias"]), [], MERGES[merge]()

    def recorded(heads):
        taken.append(own(heads))
        return taken[-1]

    narrow = convert_attention(wide, 2, merge=recorded)
    assert len(taken) == 4  # two groups of keys, two of values
    says = [np.concatenate([turn @ own for turn in turns]) for own, turns in taken]
    says = [np.stack(np.split(heads, 2)) for heads in says]
    key, value = np.concatenate(says[:2]), np.concatenate(says[2:])
    biases = dict(key_bias=key[..., -1], value_bias=value[..., -1])
    same = replaced(wide, key=key[..., :-1], value=value[..., :-1], **biases)
    np.testing.assert_allclose(run(narrow), run(same), rtol=1e-4, atol=1e-5)


def test_the_mean_with_rope_is_that_of_the_rotated_keys():
    wide = attention(4, **OPTIONS["rope_bias"])
    narrow = convert_attention(wide, 2, merge=mean)
    x = jax.random.normal(jax.random.key(5), (B, T, D))
    positions = jnp.tile(jnp.arange(T) + 5, (B, 1))
    own, _ = narrow.project_key_value(x, positions)
    theirs, _ = wide.project_key_value(x, positions)
    expected = theirs.reshape(B, T, 2, 2, H).mean(axis=3)
    np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_complex", [False, True])
def test_no_merge_loses_less_than_the_truncated(is_complex):
    rng = np.random.default_rng(1)
    heads = rng.normal(size=(3, 1 if is_complex else 4, D)) + 0.5
    heads = heads + 1j * rng.normal(size=heads.shape) if is_complex else heads

    def loss(merge):
        merged, turns = merge(heads)
        return np.sum(np.abs(heads - turns @ merged) ** 2)

    losses = [loss(merge) for merge in (truncated, aligned, mean, first)]
    assert losses[0] < losses[1] < losses[2] < losses[3]


def test_a_random_head_is_as_large_as_theirs():
    module = attention(8)
    draw = MERGES["random"]()
    one, other = (convert_attention(module, 1, merge=draw) for _ in range(2))
    assert float(jnp.std(one.key[...])) == pytest.approx(float(jnp.std(module.key[...])), rel=0.3)
    assert not np.allclose(one.key[...], other.key[...])
    np.testing.assert_array_equal(one.query[...], module.query[...])


def test_what_cannot_be_is_refused():
    for heads, message in ((3, "num_kv_heads=3 does not divide the 4"), (8, "num_kv_heads=8")):
        with pytest.raises(ValueError, match=message):
            convert_attention(attention(4), heads)
    with pytest.raises(ValueError, match="num_kv_heads must be at least 1"):
        convert_attention(attention(4), 0)


# How many heads are kept, and what of the directory is changed for it.
FAMILIES = {
    "gpt2": (2, dict(n_head=4)),
    "gpt_bigcode_heads": (2, dict(n_head=4)),
    "llama": (1, {}),
    "qwen3": (1, {}),
    "falcon_sequential": (2, {}),
    "t5": (1, {}),
    "marian": (1, {}),
}


@jax.jit
def called_with(model, *ids):
    return model(*ids)


def logits(model):
    source, targets = np.array([IDS]), np.array([TARGETS])
    ids = (source, targets) if isinstance(model, EncoderDecoder) else (source,)
    return called_with(model, *ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_every_kind(tmp_path, name):
    kept, changes = FAMILIES[name]
    pretrained = load(write(tmp_path / "given", name, **changes))
    model = pretrained.model
    config, had = model.config, model.config.num_kv_heads
    expected = logits(model)
    same = convert_heads(model, had)
    np.testing.assert_array_equal(logits(same), expected)
    for merge in (mean, truncated):
        narrow = convert_heads(model, kept, merge=merge)
        changed = dict(num_kv_heads=kept)
        if isinstance(model, EncoderDecoder):
            changed |= dict(encoder_kv_heads=had, cross_kv_heads=kept)
            assert narrow.encoder_layers[0].attention.key.shape[0] == had
            assert narrow.decoder.layers[0].cross_attention.key.shape[0] == kept
        assert narrow.config == dataclasses.replace(config, **changed)
        # As a model of that config would be, in every shape, dtype and axis.
        build = functools.partial(type(model), narrow.config)
        like = nnx.eval_shape(lambda build=build: build(rngs=nnx.Rngs(0)))
        for (path, own), (_, wanted) in zip(
            *(nnx.to_flat_state(nnx.state(m)) for m in (narrow, like)), strict=True
        ):
            assert (own.shape, own.dtype) == (wanted.shape, wanted.dtype), path
            assert own.get_metadata().get("axes") == wanted.get_metadata().get("axes"), path
        found = logits(narrow)
        assert np.isfinite(found).all()
        assert not np.allclose(found, expected, atol=1e-3)
        # Through a directory of the hub nothing is lost.
        save(tmp_path / merge.__name__, dataclasses.replace(pretrained, model=narrow))
        again = load(tmp_path / merge.__name__).model
        assert again.config == narrow.config
        np.testing.assert_array_equal(logits(again), found)
        check_decoding(again)
    assert model.config == config and np.array_equal(logits(model), expected)


def check_decoding(model):
    """What is decoded token by token is what the logits of a whole sequence say."""
    options = dict(search=greedy, batch_size=1, bos_id=0, max_new_tokens=3)
    (answer,) = Generator(model, **options).tokens(nnx.state(model), [IDS])
    if isinstance(model, EncoderDecoder):
        found = called_with(model, np.array([IDS]), np.array([[0, *answer]]))[0, :-1]
    else:
        found = called_with(model, np.array([[*IDS, *answer]]))[0, len(IDS) - 1 : -1]
    assert np.argmax(found, axis=-1).tolist() == answer


def test_a_gpt2_with_one_head_is_a_gpt_bigcode(tmp_path):
    pretrained = load(write(tmp_path / "given", "gpt2"))
    narrow = convert_heads(pretrained.model, 1)
    save(tmp_path / "saved", dataclasses.replace(pretrained, model=narrow), family="gpt_bigcode")
    again = load(tmp_path / "saved")
    assert again.family == "gpt_bigcode" and again.model.config == narrow.config
    np.testing.assert_array_equal(logits(again.model), logits(narrow))


def no_turns(heads):
    return heads[0]


def narrow_head(heads):
    return heads[0][:, :3], np.zeros((len(heads), H, H))


def turns_of_one(heads):
    return heads[0], np.eye(H)


def no_numbers(heads):
    return heads[0] * np.nan, np.stack([np.eye(H)] * len(heads))


@pytest.mark.parametrize(
    "merge, says",
    [
        ("mean", "merge must be a function, .*not 'mean'"),
        (no_turns, r"the shapes \[\(6, 11\), \(2, 6, 6\)\] for .*, and returned ndarray"),
        (narrow_head, r"and returned \[\(6, 3\), \(2, 6, 6\)\]"),
        (turns_of_one, r"and returned \[\(6, 11\), \(6, 6\)\]"),
        (no_numbers, "merge returned what are no numbers"),
    ],
)
@pytest.mark.parametrize("regroup", [False, True])
def test_a_merge_of_a_user_s_own_is_looked_at(merge, says, regroup):
    with pytest.raises(ValueError, match=says):
        convert_attention(attention(4), 2, merge=merge, regroup=regroup)


def test_what_is_no_module_of_ours_is_refused():
    theirs = nnx.MultiHeadAttention(4, D + 1, decode=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="a MultiHeadAttention is no mqa_jax.Attention"):
        convert_attention(theirs, 2)
    with pytest.raises(ValueError, match="a MultiHeadAttention is neither an EncoderDecoder"):
        convert_heads(theirs, 2)


def test_where_no_merge_is_said_it_is_the_command_s():
    """What was measured to keep most, in Python as on the command line."""
    wide = attention(4)
    said = nnx.state(convert_attention(wide, 2, merge=MERGES[DEFAULT]()))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(convert_attention(wide, 2)), said)
    sizes = dict(vocab_size=7, d_model=D, d_ff=5, num_layers=1, num_heads=N, head_dim=H)
    config = mqa_jax.TransformerConfig(**sizes, num_kv_heads=4, max_length=9)
    model = mqa_jax.DecoderOnly(config, rngs=nnx.Rngs(0))
    said = nnx.state(convert_heads(model, 2, merge=MERGES[DEFAULT]()))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(convert_heads(model, 2)), said)


def test_parts_apart():
    sizes = dict(vocab_size=7, d_model=D, d_ff=5, num_layers=2, num_heads=N, head_dim=H)
    config = mqa_jax.TransformerConfig(**sizes, num_kv_heads=8, max_length=9)
    model = EncoderDecoder(config, rngs=nnx.Rngs(0))
    narrow = convert_heads(model, 4, encoder_kv_heads=2, cross_kv_heads=1, merge=aligned)
    heads = [narrow.encoder_layers[1].attention, narrow.decoder.layers[1].attention]
    heads.append(narrow.decoder.layers[1].cross_attention)
    assert [module.key.shape[0] for module in heads] == [2, 4, 1]
    language_model = mqa_jax.DecoderOnly(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="encoder_kv_heads=2, .* a DecoderOnly has neither"):
        convert_heads(language_model, 1, encoder_kv_heads=2)


@both
def test_heads_side_by_side_that_are_not_alike_are_regrouped(options):
    """A model whose heads stand in another order comes to the same as one whose pairs do not."""
    narrow, rng = attention(2, **options), np.random.default_rng(7)
    wide = repeated(narrow, 2)
    order = np.array([0, 2, 1, 3])
    weights = {}
    for name in ("key", "value", "query", "key_bias", "value_bias", "query_bias"):
        if (weight := getattr(wide, name, None)) is not None:
            by_head = np.asarray(weight[...]).reshape(4, -1, *weight.shape[1:])
            weights[name] = by_head[order].reshape(weight.shape)
    out = np.asarray(wide.out[...]).reshape(D, 4, N // 4, H)
    weights["out"] = out[:, order].reshape(D, N, H)
    mixed = replaced(wide, **weights)
    np.testing.assert_allclose(run(mixed), run(wide), rtol=2e-4, atol=2e-5)
    moment = np.diag(rng.uniform(0.5, 2, D + bool(options.get("qkv_bias"))))
    for merge, given in ((mean, None), (aligned, None), (truncated, None), (truncated, moment)):
        found = convert_attention(mixed, 2, merge=merge, regroup=True, moment=given)
        np.testing.assert_allclose(run(found), run(wide), rtol=2e-3, atol=2e-4)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(run(convert_attention(mixed, 2)), run(wide), rtol=0.1)


def test_three_heads_of_a_group_are_found_as_well():
    narrow = mqa_jax.Attention(D, 6, 2, H, rngs=nnx.Rngs(0))
    wide = repeated(narrow, 3)
    order = [0, 3, 1, 4, 5, 2]
    weights = {name: getattr(wide, name)[...][jnp.array(order)] for name in ("key", "value")}
    weights["query"] = wide.query[...][jnp.array(order)]
    weights["out"] = wide.out[...][:, jnp.array(order)]
    found = convert_attention(replaced(wide, **weights), 2, regroup=True)
    np.testing.assert_allclose(run(found), run(wide), rtol=1e-4, atol=1e-5)


def test_no_worse_heads_are_regrouped():
    """Where all are as far from each other, they stay where they are."""
    module = attention(4)
    key = np.zeros((4, H, D))
    for head in range(4):
        key[head, :, head] = 1.0
    module = replaced(module, key=key, value=key)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.state(convert_attention(module, 2, regroup=True)),
        nnx.state(convert_attention(module, 2)),
    )


def test_heads_with_biases_of_their_own_are_not_regrouped(tmp_path):
    sizes = dict(vocab_size=7, d_model=D, d_ff=5, num_layers=1, num_heads=4, head_dim=H)
    shared = dict(num_kv_heads=4, max_length=9, positions="relative")
    model = EncoderDecoder(mqa_jax.TransformerConfig(**sizes, **shared), rngs=nnx.Rngs(0))
    layer = model.decoder.layers[0]
    for module in (layer.attention, layer.cross_attention):
        key = np.array(module.key[...])
        key[2], key[3] = key[0], key[1]
        value = np.array(module.value[...])
        value[2], value[3] = value[0], value[1]
        module.key[...], module.value[...] = jnp.asarray(key), jnp.asarray(value)
    found = convert_heads(model, 2, merge=mean, regroup=True).decoder.layers[0]
    np.testing.assert_array_equal(found.attention.query[...], layer.attention.query[...])
    # Cross-attention has no such bias.
    query = layer.cross_attention.query[...]
    np.testing.assert_allclose(
        found.cross_attention.query[...], query[jnp.array([0, 2, 1, 3])], atol=1e-6
    )


def moment_of(module, seed=3):
    """Of inputs that are far from alike in all directions."""
    inputs = D + (module.key_bias is not None)
    root = np.random.default_rng(seed).normal(size=(inputs, inputs)) * np.geomspace(1, 50, inputs)
    return root @ root.T


@both
@pytest.mark.parametrize("merge", [mean, first, aligned, truncated])
def test_a_moment_of_inputs_that_are_all_alike_changes_nothing(options, merge):
    module = attention(4, **options)
    moment = np.eye(D + (module.key_bias is not None)) * 3.0
    found = run(convert_attention(module, 2, merge=merge, moment=moment))
    # Vectors may have the other sign.
    np.testing.assert_allclose(
        found, run(convert_attention(module, 2, merge=merge)), rtol=2e-3, atol=2e-4
    )


@both
@pytest.mark.parametrize("merge", [mean, aligned, truncated])
def test_heads_that_are_alike_become_one_with_any_moment(options, merge):
    wide = repeated(attention(1, **options), 4)
    merged = convert_attention(wide, 1, merge=merge, moment=moment_of(wide))
    np.testing.assert_allclose(run(merged), run(wide), rtol=1e-3, atol=1e-4)
    same = convert_attention(wide, 4, merge=merge, moment=moment_of(wide))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(same), nnx.state(wide))


def test_a_text_of_few_tokens_loses_nothing_though_its_moment_is_rounded():
    """Fewer inputs than a head has dimensions; as added up in float32, with powers below 0."""
    module, rng = attention(8), np.random.default_rng(0)
    inputs_TD = rng.normal(size=(3, D))
    rest_DD = np.linalg.svd(inputs_TD)[2][3:].T
    moment = inputs_TD.T @ inputs_TD
    moment -= 3e-7 * np.trace(moment) * rest_DD @ rest_DD.T
    narrow = convert_attention(module, 1, merge=truncated, moment=moment)
    found, expected = (
        np.asarray(each(jnp.asarray(inputs_TD[None], jnp.float32), is_causal=True))
        for each in (narrow, module)
    )
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_moments_that_cannot_be_are_refused():
    module = attention(4, qkv_bias=True)
    for moment, message in (
        (np.eye(D), rf"with biases \[D \+ 1, D \+ 1\], so \[{D + 1}, {D + 1}\], and is \[{D}"),
        (np.zeros((D + 1, D + 1)), "of no inputs"),
        (np.full((D + 1, D + 1), np.nan), "no numbers"),
    ):
        with pytest.raises(ValueError, match=f"moment .*{message}"):
            convert_attention(module, 1, moment=moment)
