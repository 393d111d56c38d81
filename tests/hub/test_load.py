"""A directory as a model: the logits of transformers, whatever names and copies a file has."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import CONFIGS, IDS, TARGETS, golden, tensors, values, write
from flax import nnx

from mqa_jax import ShardingRules, make_mesh
from mqa_jax.hub import load, read_config, save
from mqa_jax.hub.load import weights_by_path
from mqa_jax.model.transformer import EncoderDecoder, build_model


def logits(pretrained):
    model, ids = pretrained.model, jnp.asarray([IDS])
    with jax.default_matmul_precision("highest"):
        if isinstance(model, EncoderDecoder):
            return np.asarray(model(ids, jnp.asarray([TARGETS])))[0]
        return np.asarray(model(ids))[0]


def check_logits(directory, name, **options):
    np.testing.assert_allclose(
        logits(load(directory, **options)), golden()[name]["logits"], rtol=0, atol=2e-5
    )


def replace(directory, tensors):
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(tmp_path, name):
    check_logits(write(tmp_path, name), name)


def renamed(found, cut):
    return {name.removeprefix(cut): tensor for name, tensor in found.items()}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("gpt2", "transformer."),
        ("falcon_40b", "transformer."),
        ("llama", "model."),
        ("marian", "model."),
    ],
)
def test_names_may_lack_their_head(tmp_path, name, head):
    replace(write(tmp_path, name), renamed(tensors(name), head))
    check_logits(tmp_path, name)


def with_masks(found):
    masks = {f"h.{i}.attn.bias": np.zeros((1, 1, 11, 11), np.uint8) for i in range(2)}
    return renamed(found, "transformer.") | masks | {"h.0.attn.masked_bias": np.float32([-1e4])}


EXTRAS = {
    "gpt2": with_masks,
    "llama": lambda found: (
        found | {"model.layers.1.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    ),
    "qwen3": lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"]},
    "t5": lambda found: (
        found
        | {
            f"{place}.weight": found["shared.weight"]
            for place in ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")
        }
        | {
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.zeros(
                (6, 3), np.float32
            )
        }
    ),
    "t5_gated": lambda found: {
        name.replace("shared", "decoder.embed_tokens"): tensor for name, tensor in found.items()
    },
    "marian": lambda found: (
        {name.replace("model.shared", "lm_head"): tensor for name, tensor in found.items()}
        | {
            f"model.{side}.embed_positions.weight": np.zeros((17, 20), np.float32)
            for side in ("encoder", "decoder")
        }
    ),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_what_says_nothing_new_is_passed_over(tmp_path, name):
    replace(write(tmp_path, name), EXTRAS[name](tensors(name)))
    check_logits(tmp_path, name)


def test_softmax_weights_are_tied_where_the_file_has_none_of_their_own(tmp_path):
    own = {"lm_head.weight": values("another", [31, 24])}
    for case, (found, is_tied) in enumerate(
        [(tensors("qwen3"), True), (tensors("qwen3") | own, False), (tensors("llama"), False)]
    ):
        directory = write(tmp_path / str(case), "llama" if case == 2 else "qwen3")
        replace(directory, found)
        pretrained = load(directory)
        assert pretrained.model.config.tied_softmax == is_tied
        assert ("softmax.kernel" in weights_by_path(nnx.state(pretrained.model))) != is_tied


def changed(name, **changes):
    return lambda found: {
        key: changes.get(key.rpartition(".")[0].rpartition(".")[2], lambda x: x)(tensor)
        for key, tensor in found.items()
    }


def without(name):
    return lambda found: {key: tensor for key, tensor in found.items() if key != name}


def at(name, change):
    return lambda found: found | {name: change(found[name])}


def adding(name, tensor):
    return lambda found: found | {name: tensor}


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
WRONG = [
    ("llama", without(K_PROJ), rf"lacks the tensor {K_PROJ}"),
    ("llama", without("model.embed_tokens.weight"), "lacks the tensor model.embed_tokens.weight"),
    ("t5", without("shared.weight"), "lacks the tensor shared.weight"),
    ("llama", at(K_PROJ, lambda x: x.T), r"k_proj.weight is F32 \[24, 12\].*must be \[12, 24\]"),
    ("gpt2", at("transformer.h.0.mlp.c_fc.weight", lambda x: x.T), r"must be \[20, 80\]"),
    ("llama", at(K_PROJ, lambda x: x.astype(np.int8)), r"k_proj.weight is I8.*quantized"),
    ("llama", at(K_PROJ, lambda x: x * np.inf), "k_proj.weight in .* holds NaN or infinity"),
    ("llama", at("model.embed_tokens.weight", lambda x: x[:-1]), r"\[30, 24\].* \[31, 24\]"),
    (
        "llama",
        adding("model.layers.2.input_layernorm.weight", np.ones(24, np.float32)),
        r"has model.layers.2.input_layernorm.weight, F32 \[24\] .* of 2 layers, has no place",
    ),
    ("gpt2", adding("transformer.h.0.attn.bias", np.ones(60, np.float32)), "has no place"),
    ("llama", adding("embed_tokens.weight", np.ones(1, np.float32)), "has both .* the same"),
    ("t5", adding("encoder.embed_tokens.weight", np.ones((31, 22), np.float32)), "differ, but"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG)
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(tmp_path, name, change, message):
    replace(write(tmp_path, name), change(tensors(name)))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", ["gemma", "falcon_40b", "marian"])
def test_weights_are_of_the_dtype_that_is_asked_for_and_norms_of_float32(tmp_path, name):
    narrow = {key: tensor.astype("bfloat16") for key, tensor in tensors(name).items()}
    replace(write(tmp_path, name), narrow)
    pretrained = load(tmp_path, dtype="bfloat16")
    weights = weights_by_path(nnx.state(pretrained.model))
    norms = {path for path in weights if "norm" in path}
    assert norms and {weights[path][...].dtype for path in norms} == {jnp.dtype("float32")}
    others = {weights[path][...].dtype for path in weights.keys() - norms}
    assert others == {jnp.dtype("bfloat16")}
    # Widened they are the same numbers.
    wide = weights_by_path(nnx.state(load(tmp_path).model))
    for path, weight in weights.items():
        assert wide[path][...].dtype == jnp.float32
        np.testing.assert_array_equal(wide[path][...], np.asarray(weight[...], np.float32))
    found, expected = logits(pretrained), logits(load(tmp_path))
    assert 0 < np.abs(found - expected).max() < 0.3


def test_weights_lie_where_the_rules_put_them(tmp_path):
    replace(write(tmp_path, "qwen3"), tensors("qwen3"))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with pytest.raises(ValueError, match=r"axis F .* size 29, which the 2 parts"):
        load(tmp_path, mesh=mesh)
    directory = write(tmp_path / "even", "qwen3", vocab_size=32, intermediate_size=28)
    found = tensors("qwen3")
    found["model.embed_tokens.weight"] = values("embed", [32, 24])
    for name in found:
        if "mlp" in name:
            found[name] = values(name, [24, 28] if "down" in name else [28, 24])
    replace(directory, found)
    split, whole = load(directory, mesh=mesh), load(directory)
    state, expected = (weights_by_path(nnx.state(p.model)) for p in (split, whole))
    for path, weight in state.items():
        np.testing.assert_array_equal(weight[...], expected[path][...])
        assert weight[...].sharding.mesh == mesh
    shard = state["decoder.layers.0.attention.query"][...].addressable_shards[0].data
    assert shard.shape == (3, 10, 12)  # of 6 heads, 10, 24
    with pytest.raises(ValueError, match="rules are of no effect without a mesh"):
        load(directory, rules=ShardingRules())
    with pytest.raises(ValueError, match=r"mesh must be a jax\.sharding\.Mesh, .* not 8"):
        load(directory, mesh=8)


def test_a_config_alone_has_the_weights_of_its_checkpoint(tmp_path):
    for name in CONFIGS:
        directory = write(tmp_path / name, name)
        task, config = read_config(directory)
        model = nnx.eval_shape(
            lambda task=task, config=config: build_model(task, vars(config), rngs=nnx.Rngs(0))
        )
        own, loaded = (
            {path: x.shape for path, x in weights_by_path(nnx.state(m)).items()}
            for m in (model, load(directory).model)
        )
        assert own == loaded


def test_numbers_that_a_dtype_has_not_are_refused(tmp_path):
    """Infinity is no weight, and no rounding of one."""
    directory = write(tmp_path, "llama")
    stored = tensors("llama")
    name = next(name for name in stored if name.endswith("mlp.up_proj.weight"))
    for dtype, number, wanted in (("float64", 1e300, "float32"), ("float32", 3.4e38, "bfloat16")):
        stored[name] = tensors("llama")[name].astype(dtype)
        stored[name][2, 3] = number
        replace(directory, stored)
        with pytest.raises(ValueError, match=f"{name} in .*safetensors has numbers that {wanted}"):
            load(directory, dtype=wanted)
    load(directory, dtype="float32")


def test_what_nobody_obeys_is_told(tmp_path):
    directory = write(tmp_path, "llama")
    values = dict(typical_p=1.0, begin_suppress_tokens=[], num_beam_groups=2, stop_strings=["x"])
    (directory / "generation_config.json").write_text(json.dumps(values | dict(top_k=50)))
    told = dict(num_beam_groups=2, stop_strings=["x"])
    assert load(directory).generation.unheeded == told
    # What nobody here obeys is not lost either.
    save(tmp_path / "saved", load(directory))
    assert load(tmp_path / "saved").generation == load(directory).generation
    values = dict(guidance_scale=0.0, top_h=0.5, num_return_sequences=1, token_healing=False)
    (directory / "generation_config.json").write_text(json.dumps(values))
    assert [*load(directory).generation.unheeded] == ["guidance_scale", "top_h"]


def test_what_decodes_comes_from_the_directory(tmp_path):
    directory = write(tmp_path, "marian", num_beams=3, bad_words_ids=[[30]])
    generation = load(directory).generation
    assert generation.eos_ids == (0,) and generation.decoder_start_id == 30
    assert generation.bad_words == ((30,),) and generation.num_beams == 3
    # The other file stands for all of it, but for the ids.
    (directory / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[2, 5])))
    generation = load(directory).generation
    assert generation.eos_ids == (2, 5) and generation.decoder_start_id == 30
    assert generation.bad_words == () and generation.num_beams == 1
    # Words for none.
    words = dict(eos_token_id=[], pad_token_id=-1, bos_token_id=None, forced_eos_token_id=[])
    (directory / "generation_config.json").write_text(json.dumps(words))
    generation = load(directory).generation
    assert (generation.eos_ids, generation.pad_id, generation.bos_id) == ((), None, None)
    assert generation.forced_eos_id is None
    # Ids that a smaller model has not, and nothing is decoded with.
    ids = json.dumps(dict(bos_token_id=50256, pad_token_id=31, eos_token_id=3))
    (directory / "generation_config.json").write_text(ids)
    generation = load(directory).generation
    assert (generation.bos_id, generation.pad_id, generation.eos_ids) == (None, None, (3,))
    # A file that says nothing is one.
    (directory / "generation_config.json").write_text("{}")
    assert load(directory).generation.num_beams == 1


def test_what_a_target_begins_with_where_nothing_says_so(tmp_path):
    for name, ids, start in (("bos", dict(bos_token_id=5), 5), ("pad", dict(bos_token_id=-1), 3)):
        directory = write(tmp_path / name, "t5", decoder_start_token_id=None, pad_token_id=3, **ids)
        assert load(directory).generation.decoder_start_id == start


def test_a_softmax_that_is_promised_must_be_there(tmp_path):
    for name in ("llama", "gpt2", "marian"):
        directory = write(tmp_path / name, name, tie_word_embeddings=False)
        found = {key: x for key, x in tensors(name).items() if key != "lm_head.weight"}
        replace(directory, found)
        with pytest.raises(ValueError, match=r"lacks the tensor lm_head\.weight \(tie_word_embedd"):
            load(directory)
        with pytest.raises(ValueError, match=r"lacks the tensor lm_head\.weight"):
            read_config(directory)


def test_the_length_beside_a_rope_counts_before_the_one_in_it(tmp_path):
    directory = write(tmp_path, "llama", original_max_position_embeddings=29)
    assert load(directory).model.config.rope.original_max_length == 29


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(suppress_tokens=[], bad_words_ids=[3]), None),
        (dict(forced_eos_token_id=[3, 4]), r"forced_eos_token_id is \[3, 4\], of which only one"),
        (dict(eos_token_id=31), "eos_token_id is 31, not an id.* 0 to 30"),
        (dict(eos_token_id=[1, True]), r"eos_token_id is \[1, True\]"),
        (dict(bad_words_ids=[3]), None),
        (dict(bad_words_ids=3), "bad_words_ids is 3, not a list"),
        (dict(bad_words_ids=[[]]), "without an id"),
        (dict(num_beams=1.5), "num_beams must be an integer"),
        (dict(early_stopping="maybe"), "early_stopping is 'maybe'"),
        (dict(early_stopping=1), "early_stopping is 1, not true"),
        (dict(num_beams=2**31), "num_beams must be from 0 to 2147483647"),
        (dict(length_penalty="long"), "length_penalty must be a finite number"),
        (dict(top_p=2), "top_p must be a finite number, at least 0, at most 1"),
        (dict(temperature=-1), "temperature must be a finite number, at least 0"),
        (dict(repetition_penalty=0), "repetition_penalty must be a finite number, above 0"),
    ],
)
def test_defaults_that_cannot_be_are_refused(tmp_path, values, message):
    directory = write(tmp_path, "llama")
    (directory / "generation_config.json").write_text(json.dumps(values))
    if message is None:
        assert load(directory).generation.bad_words == ((3,),)
        return
    with pytest.raises(ValueError, match=f"generation_config.json: .*{message}"):
        load(directory)
