"""What a config.json asks for, in both generations of it; and what is refused of it."""

import dataclasses
import itertools
import json
import math

import pytest
from checkpoints import CONFIGS

from mqa_jax.attention.positions import Rope
from mqa_jax.hub import FAMILIES, read_config
from mqa_jax.hub.families import read_options, write_options
from mqa_jax.model.config import TransformerConfig


def read(name, **changes):
    """The fields that a config of `CONFIGS` asks for, with other keys; None for absent ones."""
    config = {key: value for key, value in (CONFIGS[name] | changes).items() if value is not None}
    return read_options(config, "config.json")[1]


def config_of(name, **changes):
    return TransformerConfig(**read(name, **changes))


def test_every_family_has_a_checkpoint_here():
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


SAID = {
    "gpt2": dict(
        d_ff=80, head_dim=4, num_kv_heads=5, norm="layer", norm_epsilon=1e-5, positions="learned",
        activation="gelu_tanh", bias=("qkv", "out", "mlp"), max_length=11, tied_softmax=True,
        logits_scale=1.0, block="pre", gated=False,
    ),
    "gpt_bigcode": dict(d_ff=43, num_kv_heads=1, activation="gelu_tanh"),
    "gpt_bigcode_heads": dict(d_ff=80, num_kv_heads=5, activation="gelu"),
    "llama": dict(
        head_dim=4, num_kv_heads=3, norm="rms", norm_epsilon=1e-3, bias=("qkv", "out"),
        gated=True, activation="silu", tied_softmax=False, window=None,
        rope=Rope(100.0, "llama3", 4.0, 1.0, 2.0, 13),
    ),
    "llama_linear": dict(rope=Rope(100.0, "linear", 3.0), bias=("mlp",), tied_softmax=True),
    "mistral": dict(head_dim=6, window=3, bias=(), rope=Rope(100.0)),
    "qwen2": dict(window=None, bias=("qkv",), qk_norm=False, head_dim=4),
    "qwen2_windows": dict(window=(None, 3)),
    "qwen3": dict(head_dim=10, qk_norm=True, bias=(), window=None),
    "starcoder2": dict(
        norm="layer", window=4, bias=("qkv", "out", "mlp"), gated=False, activation="gelu_tanh",
        tied_softmax=True,
    ),
    "gemma": dict(
        head_dim=8, num_kv_heads=1, activation="gelu_tanh", embedding_scale=24**0.5,
        tied_softmax=True, attention_softcap=None,
    ),
    "gemma2": dict(
        block="sandwich", window=(3, None), attention_scale=11**-0.5, attention_softcap=2.0,
        logits_softcap=3.0, activation="gelu_tanh", embedding_scale=24**0.5,
    ),
    "falcon_7b": dict(
        num_kv_heads=1, block="parallel", parallel_norms=1, bias=(), activation="gelu", d_ff=96,
        norm="layer", max_length=2048, positions="rope",
    ),
    "falcon_40b": dict(num_kv_heads=2, block="parallel", parallel_norms=2),
    "falcon_11b": dict(num_kv_heads=3, block="parallel", parallel_norms=1, d_ff=41),
    "falcon_sequential": dict(num_kv_heads=6, block="pre", bias=("qkv", "out", "mlp")),
    "t5": dict(
        num_layers=2, num_encoder_layers=3, head_dim=7, num_kv_heads=3, positions="relative",
        relative_buckets=6, relative_distance=7, attention_scale=1.0, activation="relu",
        gated=False, tied_softmax=True, logits_scale=22**-0.5, max_length=512, norm="rms",
    ),
    "t5_gated": dict(activation="gelu_tanh", gated=True, logits_scale=1.0, tied_softmax=False),
    "mt5": dict(activation="gelu_tanh", gated=True, logits_scale=1.0),
    "marian": dict(
        num_layers=2, num_encoder_layers=1, block="post", positions="sinusoidal", norm="layer",
        norm_epsilon=1e-5, bias=("qkv", "out", "mlp", "logits"), activation="silu",
        embedding_scale=20**0.5, tied_softmax=True, logits_scale=1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_what_its_model_is(name):
    fields = dict.fromkeys(f.name for f in dataclasses.fields(TransformerConfig))
    found = vars(config_of(name))
    assert SAID[name].keys() <= fields.keys()
    assert {field: found[field] for field in SAID[name]} == SAID[name]


# The same in the words of version 5: what is left out, and what is said in its place.
NEW = {
    "llama": dict(
        rope_theta=None,
        rope_scaling=None,
        rope_parameters=CONFIGS["llama"]["rope_scaling"] | dict(rope_theta=100.0),
    ),
    "qwen2_windows": dict(layer_types=["full_attention", "sliding_attention"]),
    "gemma": dict(hidden_act="gelu_pytorch_tanh"),
    "gemma2": dict(layer_types=["sliding_attention", "full_attention"]),
    "t5": dict(dense_act_fn="relu", is_gated_act=False, scale_decoder_outputs=True),
    "t5_gated": dict(
        feed_forward_proj=None,
        dense_act_fn="gelu_new",
        is_gated_act=True,
        scale_decoder_outputs=False,
        tie_word_embeddings=True,
    ),
    "falcon_7b": dict(num_kv_heads=6, activation="gelu", ffn_hidden_size=96),
}


@pytest.mark.parametrize("name", NEW)
def test_version_5_says_the_same(name):
    assert read(name, **NEW[name]) == read(name)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        # Null is absent, but where null is a value of its own.
        ("mistral", dict(sliding_window=None), dict(window=4096)),
        ("gemma2", dict(attn_logit_softcapping=None), dict(attention_softcap=50.0)),
        ("llama", dict(num_key_value_heads=None), dict(num_kv_heads=6)),
        ("gemma", dict(head_dim=None), dict(head_dim=256)),
        ("gemma", dict(hidden_activation="gelu_pytorch_tanh"), dict(activation="gelu_tanh")),
        ("gemma", dict(mlp_bias=True, attention_bias=True), dict(bias=("qkv", "out"))),
        # Of the second the other key says nothing.
        ("gemma2", dict(hidden_act="relu"), dict(activation="gelu_tanh")),
        ("gemma2", dict(hidden_activation="gelu"), dict(activation="gelu")),
        ("gemma", dict(hidden_act="silu"), dict(activation="silu")),
        ("mt5", dict(feed_forward_proj=None), dict(gated=True, activation="gelu_tanh")),
        ("mt5", dict(tie_word_embeddings=None), dict(logits_scale=1.0)),
        ("mt5", dict(tie_word_embeddings=True), dict(logits_scale=1.0)),
        ("starcoder2", dict(layer_types=["full_attention"] * 2), dict(window=4)),
        ("t5", dict(feed_forward_proj="gated-silu"), dict(gated=True, activation="silu")),
        ("t5", dict(feed_forward_proj="gelu"), dict(gated=False, activation="gelu")),
        ("t5", dict(num_decoder_layers=None), dict(num_layers=3)),
        ("marian", dict(scale_embedding=False), dict(embedding_scale=1.0)),
        ("qwen2_windows", dict(max_window_layers=0), dict(window=3)),
        ("qwen2_windows", dict(max_window_layers=2), dict(window=None)),
        ("falcon_40b", dict(num_ln_in_parallel_attn=1), dict(parallel_norms=1)),
        ("falcon_7b", dict(num_ln_in_parallel_attn=2), dict(parallel_norms=1)),
        ("llama", dict(architectures=None), dict(num_layers=2)),
        ("t5", dict(architectures=["T5WithLMHeadModel"]), dict(num_layers=2)),
    ],
)
def test_what_is_left_out_means_its_default(name, changes, said):
    found = read(name, **changes)
    assert {field: found[field] for field in said} == said


def test_null_is_none_where_it_is_a_value():
    nulls = dict(attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=None)
    found = read_options(CONFIGS["gemma2"] | nulls, "config.json")[1]
    assert found["attention_softcap"] is found["logits_softcap"] is found["window"] is None
    found = read_options(CONFIGS["mistral"] | dict(sliding_window=None), "config.json")[1]
    assert found["window"] is None


REFUSED = [
    ("llama", dict(model_type="mamba"), "model_type is 'mamba', which is not supported: gpt2, "),
    ("llama", dict(model_type=None), "model_type is missing"),
    ("llama", dict(model_type=7), "model_type is 7, which is no text"),
    ("llama", dict(architectures=["LlamaModel"]), r"architectures is \['LlamaModel'\]"),
    ("llama", dict(architectures="LlamaForCausalLM"), "architectures is 'LlamaForCausalLM'"),
    ("llama", dict(quantization_config={}), "has a quantization_config"),
    ("llama", dict(hidden_act="quick_gelu"), "hidden_act asks for the activation 'quick_gelu'"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    ("llama", dict(rope_scaling=dict(type="yarn", factor=2.0)), "type is 'yarn'.* only default"),
    ("llama", dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)), "rope_type is 'dynamic'"),
    ("llama", dict(rope_scaling=dict(rope_type="linear")), "rope_scaling: factor is missing"),
    ("llama", dict(rope_scaling=[1]), r"rope_scaling is \[1\], not an object"),
    ("llama", dict(rope_parameters=dict(partial_rotary_factor=0.25)), "partial_rotary_factor"),
    ("llama", dict(hidden_size=None), "hidden_size is missing"),
    ("llama", dict(rope_scaling=dict(factor=2.0)), "factor is 2.0, and without a rope_type.* 1.0"),
    (
        "llama",
        dict(rope_parameters=dict(full_attention=dict(rope_type="default"))),
        "rope_parameters: full_attention is {.*}, but all layers must turn positions alike",
    ),
    (
        "llama",
        dict(rope_scaling=dict(type="linear", rope_type="default", factor=2.0)),
        "rope_type is 'default', and in another place 'linear'",
    ),
    (
        "llama",
        dict(
            rope_parameters=dict(rope_type="default"),
            rope_scaling=dict(rope_type="linear", factor=2.0),
        ),
        "rope_type is 'default', and in another place 'linear'",
    ),
    (
        "llama",
        dict(rope_parameters=dict(rope_theta=7.0), rope_theta=9.0, rope_scaling=None),
        "rope_theta is 7.0, and in another place 9.0",
    ),
    ("llama", dict(hidden_size=0), "hidden_size must be from 1 to 16777216, not 0"),
    # What a few bytes could ask for would not fit into any memory.
    ("llama", dict(hidden_size=2**31), "hidden_size must be from 1 to 16777216"),
    ("llama", dict(head_dim=2**30), "head_dim must be from 1 to 16777216"),
    ("gpt2", dict(n_layer=2**31 - 1), "n_layer must be from 1 to 10000"),
    ("llama", dict(num_hidden_layers=10**10), "num_hidden_layers must be from 1 to 10000"),
    ("t5", dict(num_decoder_layers=10**9), "num_decoder_layers must be from 1 to 10000"),
    ("t5", dict(relative_attention_max_distance=10**9), "distance must be from 1 to 1048576"),
    ("llama", dict(hidden_size="24"), "hidden_size must be an integer, not '24'"),
    ("llama", dict(hidden_size=25), "hidden_size is 25, which num_attention_heads=6 does not"),
    ("llama", dict(rms_norm_eps=-1.0), "rms_norm_eps must be a finite number, above 0"),
    ("llama", dict(attention_bias="yes"), "attention_bias is 'yes', not true or false"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention is True.* only.* False"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights is False"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    ("falcon_7b", dict(alibi=True), "alibi is True"),
    ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention is True"),
    ("gemma", dict(hidden_activation="gelu"), "hidden_activation is 'gelu', but hidden_act 'gelu_"),
    ("gemma", dict(hidden_act="relu", hidden_activation="silu"), "hidden_act 'relu': they must"),
    ("llama", dict(rope_theta=math.nan), "rope_theta must be a finite number"),
    ("gemma2", dict(layer_types=["sliding_attention"]), "layer_types is .* for each of 2"),
    ("gemma2", dict(layer_types=["chunked_attention"] * 2), "layer_types is"),
    ("gemma2", dict(layer_types=[["full_attention"]] * 2), "layer_types is"),
    ("starcoder2", dict(norm_type="rms_norm"), "norm_type is 'rms_norm'"),
    ("t5", dict(feed_forward_proj="gated-swiglu"), "asks for the activation 'swiglu'"),
    ("marian", dict(normalize_before=True), "normalize_before is True"),
    ("marian", dict(share_encoder_decoder_embeddings=False), "share_encoder_decoder_embeddings"),
    ("marian", dict(static_position_embeddings=False), "static_position_embeddings is False"),
    ("marian", dict(encoder_ffn_dim=31), "encoder_ffn_dim is 31.*alike.* 29"),
    ("marian", dict(decoder_vocab_size=37), "decoder_vocab_size is 37"),
    ("gpt2", dict(num_key_value_heads="1"), "num_key_value_heads must be an integer, not '1'"),
    ("t5", dict(num_key_value_heads=0), "num_key_value_heads must be from 1"),
    ("marian", dict(cross_key_value_heads=True), "cross_key_value_heads must be an integer"),
    ("marian", dict(encoder_key_value_heads=1.0), "encoder_key_value_heads must be an integer"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_its_key(name, changes, message):
    with pytest.raises(ValueError, match=f"^config.json.*{message}"):
        read(name, **changes)


@pytest.mark.parametrize(
    ("name", "key", "field"),
    [
        ("llama", "num_key_value_heads", "num_kv_heads"),
        ("gpt2", "num_key_value_heads", "num_kv_heads"),
        ("t5", "encoder_key_value_heads", "encoder_kv_heads"),
        ("marian", "cross_key_value_heads", "cross_kv_heads"),
    ],
)
def test_what_no_model_can_be_names_the_file(tmp_path, name, key, field):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name] | {key: 4}))
    with pytest.raises(ValueError, match=f"config.json: {field}=4 does not divide"):
        read_config(tmp_path)


def test_a_config_alone_makes_a_model_of_the_length_that_is_asked_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["t5"]))
    task, config = read_config(tmp_path, dtype="bfloat16", max_length=53)
    assert (task, config.dtype, config.param_dtype) == ("translation", "bfloat16", "bfloat16")
    assert config.max_length == 53
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gpt2"]))
    assert read_config(tmp_path, max_length=11)[1].max_length == 11
    with pytest.raises(ValueError, match="has a table of 11 positions: leave max_length out"):
        read_config(tmp_path, max_length=10)
    with pytest.raises(ValueError, match="float16.*float32 or bfloat16"):
        read_config(tmp_path, dtype="float16")
    config = CONFIGS["marian"] | dict(max_position_embeddings=2**24)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="sines of so many positions .* give a max_length"):
        read_config(tmp_path)
    assert read_config(tmp_path, max_length=64)[1].max_length == 64


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_reads_as_it_was(name):
    family = FAMILIES[CONFIGS[name]["model_type"]]
    config = config_of(name)
    written = json.loads(json.dumps(write_options(family, config)))
    assert TransformerConfig(**read_options(written, "config.json")[1]) == config


KV_HEADS = {"num_key_value_heads", "encoder_key_value_heads", "cross_key_value_heads"}


@pytest.mark.parametrize("name", CONFIGS)
def test_key_value_heads_of_each_part_are_written_and_read(name):
    family, config = FAMILIES[CONFIGS[name]["model_type"]], config_of(name)
    parts = ["num_kv_heads"]
    if family.task == "translation":
        parts += ["encoder_kv_heads", "cross_kv_heads"]
    own = KV_HEADS & write_options(family, config).keys()
    divisors = [k for k in range(1, config.num_heads + 1) if config.num_heads % k == 0]
    for kv_heads in itertools.product(divisors, repeat=len(parts)):
        heads = dict(zip(parts, kv_heads, strict=True))
        written = write_options(family, dataclasses.replace(config, **heads))
        read = TransformerConfig(**read_options(json.loads(json.dumps(written)), "config.json")[1])
        for part, count in heads.items():
            found = getattr(read, part)
            assert (read.num_kv_heads if found is None else found) == count
        if family.task == "translation":
            # Keys of ours for what differs from the family's alone.
            differing = sum(count != config.num_heads for count in kv_heads)
            assert len(KV_HEADS & written.keys()) == differing
    # A model that the family can say has no other keys than before.
    assert own == ({"num_key_value_heads"} if "num_key_value_heads" in CONFIGS[name] else set())


def test_what_transformers_can_say_of_heads_is_said_in_its_words():
    config = config_of("gpt_bigcode_heads", n_head=4)
    for kv_heads, keys in ((1, set()), (2, {"num_key_value_heads"}), (4, set())):
        changed = dataclasses.replace(config, num_kv_heads=kv_heads)
        assert KV_HEADS & write_options(FAMILIES["gpt_bigcode"], changed).keys() == keys
    # The same function, which transformers knows by that name.
    config = dataclasses.replace(config_of("gpt2"), num_kv_heads=1)
    assert not KV_HEADS & write_options(FAMILIES["gpt_bigcode"], config).keys()
    assert write_options(FAMILIES["gpt2"], config)["num_key_value_heads"] == 1


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", dict(norm="layer"), "llama cannot say norm='layer' .*'rms'"),
        ("llama", dict(window=3), "llama cannot say window=3"),
        ("mistral", dict(window=(3, None)), "window="),
        ("t5", dict(attention_scale=None), "attention_scale="),
        ("qwen3", dict(logits_scale=0.5), "logits_scale=0.5"),
        ("marian", dict(embedding_scale=3.0), "embedding_scale=3.0"),
        ("falcon_sequential", dict(parallel_norms=2), "block='pre'"),
    ],
)
def test_what_a_family_cannot_say_is_not_written(name, changes, message):
    config = dataclasses.replace(config_of(name), **changes)
    with pytest.raises(ValueError, match=message):
        write_options(FAMILIES[CONFIGS[name]["model_type"]], config)


@pytest.mark.parametrize("name", ["t5", "t5_gated", "marian"])
def test_what_a_model_of_ones_own_leaves_open_is_written(name):
    """As a config of ours has it: an encoder as deep as the decoder, softmax and scales by None."""
    family, said = FAMILIES[CONFIGS[name]["model_type"]], config_of(name)
    deep = dataclasses.replace(said, num_encoder_layers=said.num_layers)
    none = {"num_encoder_layers": None, "encoder_kv_heads": None, "cross_kv_heads": None}
    if name != "marian":  # Whose logits are as they are.
        none["logits_scale"] = None
    assert write_options(family, dataclasses.replace(deep, **none)) == write_options(family, deep)
