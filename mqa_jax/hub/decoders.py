"""The families of language models: their keys and our options."""

from typing import Any

from mqa_jax.hub import names
from mqa_jax.hub.family import (
    MOST_UNITS,
    Family,
    Fields,
    even,
    head_dim,
    layer_types,
    rope_keys,
    written,
)
from mqa_jax.hub.keys import Keys
from mqa_jax.model.config import TransformerConfig

_GPT2_SIZES = dict(
    vocab_size="vocab_size",
    d_model="n_embd",
    num_layers="n_layer",
    num_heads="n_head",
    max_length="n_positions",
)


def _read_gpt2(keys: Keys, sizes: Fields) -> Fields:
    is_multi_query = keys.text("model_type") == "gpt_bigcode" and keys.flag("multi_query", True)
    return dict(
        d_ff=keys.integer("n_inner", 4 * sizes["d_model"]),
        num_kv_heads=1 if is_multi_query else sizes["num_heads"],
        head_dim=even(keys, "n_embd", "n_head"),
        norm="layer",
        norm_epsilon=keys.number("layer_norm_epsilon", 1e-5),
        bias=("qkv", "out", "mlp"),
        activation=keys.activation("activation_function", "gelu_new"),
    )


def _write_gpt2(config: TransformerConfig) -> Fields:
    return dict(
        n_inner=config.d_ff,
        layer_norm_epsilon=config.norm_epsilon,
        activation_function=written(config.activation, gelu_tanh="gelu_new"),
    )


def _write_bigcode(config: TransformerConfig) -> Fields:
    keys = dict(activation_function=written(config.activation))
    return _write_gpt2(config) | keys | dict(multi_query=config.num_kv_heads == 1)


_LLAMA_SIZES = dict(
    vocab_size="vocab_size",
    d_model="hidden_size",
    d_ff="intermediate_size",
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
    max_length="max_position_embeddings",
)


def _read_llama(keys: Keys, sizes: Fields) -> Fields:
    bias = ("qkv", "out") if keys.flag("attention_bias", False) else ()
    return dict(
        num_kv_heads=keys.integer("num_key_value_heads", sizes["num_heads"]),
        head_dim=head_dim(keys),
        norm_epsilon=keys.number("rms_norm_eps", 1e-6),
        positions="rope",
        rope=keys.rope(),
        bias=bias + (("mlp",) if keys.flag("mlp_bias", False) else ()),
        activation=keys.activation("hidden_act", "silu"),
        gated=True,
    )


def _write_llama(config: TransformerConfig) -> Fields:
    return rope_keys(config) | dict(
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_epsilon,
        attention_bias="qkv" in config.bias,
        mlp_bias="mlp" in config.bias,
        hidden_act=written(config.activation),
    )


def _read_mistral(keys: Keys, sizes: Fields) -> Fields:
    window = keys.windows([True] * sizes["num_layers"], 4096)
    return _read_llama(keys, sizes) | dict(bias=(), window=window)


def _one_window(config: TransformerConfig) -> int | None:
    """The window of all layers; those of a tuple have no key."""
    return None if isinstance(config.window, tuple) else config.window


def _write_mistral(config: TransformerConfig) -> Fields:
    return _write_llama(config) | dict(sliding_window=_one_window(config))


def _read_qwen2(keys: Keys, sizes: Fields) -> Fields:
    return _read_qwen3(keys, sizes) | dict(head_dim=head_dim(keys), bias=("qkv",), qk_norm=False)


def _read_qwen3(keys: Keys, sizes: Fields) -> Fields:
    window = None
    if keys.flag("use_sliding_window", False):
        first, layers = keys.integer("max_window_layers", 28, least=0), sizes["num_layers"]
        window = keys.windows([i >= first for i in range(layers)], 4096)
    # Its layers' biases go by `attention_bias` alone.
    fields = _read_llama(keys, sizes)
    bias = tuple(name for name in fields["bias"] if name != "mlp")
    head_dim = keys.integer("head_dim", 128, most=MOST_UNITS)
    return fields | dict(head_dim=head_dim, bias=bias, qk_norm=True, window=window)


def _write_qwen(config: TransformerConfig) -> Fields:
    by_layer = config.windows
    layers = [i for i, window in enumerate(by_layer) if window]
    return _write_llama(config) | dict(
        use_sliding_window=bool(layers),
        max_window_layers=layers[0] if layers else config.num_layers,
        sliding_window=by_layer[layers[0]] if layers else None,
        layer_types=layer_types(by_layer),
    )


def _read_starcoder2(keys: Keys, sizes: Fields) -> Fields:
    return _read_llama(keys, sizes) | dict(
        head_dim=even(keys, "hidden_size", "num_attention_heads"),
        norm="layer",
        norm_epsilon=keys.number("norm_epsilon", 1e-5),
        # In all layers, whatever `layer_types` may say.
        window=None if keys.optional("sliding_window") is None else keys.integer("sliding_window"),
        bias=("qkv", "out", "mlp") if keys.flag("use_bias", True) else (),
        activation=keys.activation("hidden_act", "gelu_pytorch_tanh"),
        gated=False,
    )


def _write_starcoder2(config: TransformerConfig) -> Fields:
    return rope_keys(config) | dict(
        num_key_value_heads=config.num_kv_heads,
        norm_epsilon=config.norm_epsilon,
        sliding_window=_one_window(config),
        use_bias=bool(config.bias),
        hidden_act=written(config.activation),
    )


def _read_gemma(keys: Keys, sizes: Fields) -> Fields:
    # Of old files "gelu" is a mistake that was made good in the code: they mean the other one.
    name = keys.text("hidden_act", tanh := "gelu_pytorch_tanh")
    name = tanh if name == "gelu" else name
    activation = keys.known_activation("hidden_act", name)
    # Which of the two counts has changed from one version of transformers to another.
    if activation != keys.activation("hidden_activation", name):
        raise keys.refused("hidden_activation", f"but hidden_act {name!r}: they must be the same")
    return _read_gemmas(keys, sizes) | dict(activation=activation)


def _read_gemmas(keys: Keys, sizes: Fields) -> Fields:
    """What all have in common."""
    return _read_llama(keys, sizes) | dict(
        head_dim=keys.integer("head_dim", 256, most=MOST_UNITS),
        bias=("qkv", "out") if keys.flag("attention_bias", False) else (),
        embedding_scale=sizes["d_model"] ** 0.5,
    )


def _write_gemma(config: TransformerConfig) -> Fields:
    activation = written(config.activation)
    return _write_llama(config) | dict(hidden_act=activation, hidden_activation=activation)


def _read_gemma2(keys: Keys, sizes: Fields) -> Fields:
    is_windowed = [i % 2 == 0 for i in range(sizes["num_layers"])]
    return _read_gemmas(keys, sizes) | dict(
        activation=keys.activation("hidden_activation", "gelu_pytorch_tanh"),
        block="sandwich",
        attention_scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=keys.optional("attn_logit_softcapping", 50.0),
        logits_softcap=keys.optional("final_logit_softcapping", 30.0),
        window=keys.windows(is_windowed, 4096),
    )


def _write_gemma2(config: TransformerConfig) -> Fields:
    by_layer, scale = config.windows, config.attention_scale or config.head_dim**-0.5
    return _write_gemma(config) | dict(
        # Which must be a whole number.
        query_pre_attn_scalar=max(1, round(scale**-2)),
        attn_logit_softcapping=config.attention_softcap,
        final_logit_softcapping=config.logits_softcap,
        # Never null, though no layer has one.
        sliding_window=next(filter(None, by_layer), 4096),
        layer_types=layer_types(by_layer),
    )


_FALCON_SIZES = dict(
    vocab_size="vocab_size",
    d_model="hidden_size",
    num_layers="num_hidden_layers",
    num_heads="num_attention_heads",
)


def _read_falcon(keys: Keys, sizes: Fields) -> Fields:
    heads, is_new = sizes["num_heads"], keys.flag("new_decoder_architecture", False)
    # Saved files of the older architecture have a num_kv_heads that means nothing.
    kv_heads = 1 if keys.flag("multi_query", True) else heads
    norms = keys.integer("num_ln_in_parallel_attn", 2) if is_new else 1
    return dict(
        max_length=keys.integer("max_position_embeddings", 2048),
        d_ff=keys.integer("ffn_hidden_size", 4 * sizes["d_model"]),
        num_kv_heads=keys.integer("num_kv_heads", heads) if is_new else kv_heads,
        head_dim=even(keys, "hidden_size", "num_attention_heads"),
        norm="layer",
        norm_epsilon=keys.number("layer_norm_epsilon", 1e-5),
        block="parallel" if is_new or keys.flag("parallel_attn", True) else "pre",
        parallel_norms=norms,
        positions="rope",
        rope=keys.rope(),
        bias=("qkv", "out", "mlp") if keys.flag("bias", False) else (),
        activation=keys.activation("activation", "gelu"),
    )


def _write_falcon(config: TransformerConfig) -> Fields:
    # The new architecture is always parallel.
    is_old = config.parallel_norms == 1 and (
        config.num_kv_heads in (1, config.num_heads) or config.block != "parallel"
    )
    return rope_keys(config) | dict(
        max_position_embeddings=config.max_length,
        ffn_hidden_size=config.d_ff,
        new_decoder_architecture=not is_old,
        num_kv_heads=config.num_kv_heads,
        multi_query=config.num_kv_heads < config.num_heads,
        layer_norm_epsilon=config.norm_epsilon,
        parallel_attn=config.block == "parallel",
        num_ln_in_parallel_attn=None if is_old else config.parallel_norms,
        bias=bool(config.bias),
        activation=written(config.activation),
        alibi=False,
    )


_INV_FREQ = {r".*\.rotary_emb\.inv_freq": None}
_MASKS = {r".*\.attn\.bias": 4, r".*\.attn\.masked_bias": None}
_LLAMA_LIKE: dict[str, Any] = dict(
    sizes=_LLAMA_SIZES, names=names.llama, head="model.", ignored=_INV_FREQ
)
_UNTIED = _LLAMA_LIKE | dict(is_tied=False)
_GEMMA_LIKE = _LLAMA_LIKE | dict(norm_offset=1.0, only=dict(use_bidirectional_attention=False))
_GPT2_LIKE: dict[str, Any] = dict(
    sizes=_GPT2_SIZES,
    read=_read_gpt2,
    names=names.gpt2,
    head="transformer.",
    ignored=_MASKS,
    only=dict(
        add_cross_attention=False, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False
    ),
)
DECODERS = (
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        write=_write_gpt2,
        fused="blocks",
        is_conv1d=True,
        **_GPT2_LIKE,
    ),
    Family(
        "gpt_bigcode",
        "GPTBigCodeForCausalLM",
        write=_write_bigcode,
        fused="grouped",
        **_GPT2_LIKE,
    ),
    Family("llama", "LlamaForCausalLM", read=_read_llama, write=_write_llama, **_UNTIED),
    Family("mistral", "MistralForCausalLM", read=_read_mistral, write=_write_mistral, **_UNTIED),
    Family("qwen2", "Qwen2ForCausalLM", read=_read_qwen2, write=_write_qwen, **_UNTIED),
    Family("qwen3", "Qwen3ForCausalLM", read=_read_qwen3, write=_write_qwen, **_UNTIED),
    Family(
        "starcoder2",
        "Starcoder2ForCausalLM",
        read=_read_starcoder2,
        write=_write_starcoder2,
        only=dict(mlp_type="default", norm_type="layer_norm"),
        **_LLAMA_LIKE,
    ),
    Family("gemma", "GemmaForCausalLM", read=_read_gemma, write=_write_gemma, **_GEMMA_LIKE),
    Family("gemma2", "Gemma2ForCausalLM", read=_read_gemma2, write=_write_gemma2, **_GEMMA_LIKE),
    Family(
        "falcon",
        "FalconForCausalLM",
        sizes=_FALCON_SIZES,
        read=_read_falcon,
        write=_write_falcon,
        names=names.falcon,
        head="transformer.",
        ignored=_INV_FREQ,
        fused="grouped",
        only=dict(alibi=False),
    ),
)
