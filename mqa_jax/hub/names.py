"""The names of our modules, and what each family calls them.

A name with `#` stands for one in each layer. Theirs are followed by `.weight` and `.bias` in a
file; `logits_bias` is a tensor's whole name.
"""

from collections.abc import Mapping

from mqa_jax.model.config import TransformerConfig


def _layers(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    """`names` within a layer as names within the model."""
    return {f"{ours}.#.{name}": f"{theirs}.{their}" for name, their in names.items()}


def _attention(ours: str, theirs: str, names: tuple[str, str, str, str]) -> dict[str, str]:
    parts = ("query", "key", "value", "out")
    return {f"{ours}.{part}": f"{theirs}.{name}" for part, name in zip(parts, names, strict=True)}


def gpt2(config: TransformerConfig) -> dict[str, str]:
    """GPT-2 and GPTBigCode."""
    return {
        "embedding": "transformer.wte",
        "softmax": "lm_head",
        "decoder.embedder.positions": "transformer.wpe",
        "decoder.norm": "transformer.ln_f",
    } | _layers(
        "decoder.layers",
        "transformer.h.#",
        {
            "attention_norm": "ln_1",
            **_attention("attention", "attn", ("c_attn", "c_attn", "c_attn", "c_proj")),
            "feed_forward_norm": "ln_2",
            "feed_forward.wi": "mlp.c_fc",
            "feed_forward.wo": "mlp.c_proj",
        },
    )


def llama(config: TransformerConfig) -> dict[str, str]:
    """Llama and those that follow it: Mistral, Qwen, StarCoder2, Gemma."""
    is_sandwich = config.block == "sandwich"
    layer = {
        "attention_norm": "input_layernorm",
        **_attention("attention", "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.wi": "mlp.up_proj" if config.gated else "mlp.c_fc",
        "feed_forward.wo": "mlp.down_proj" if config.gated else "mlp.c_proj",
    }
    if is_sandwich:
        layer |= {
            "attention_post_norm": "post_attention_layernorm",
            "feed_forward_norm": "pre_feedforward_layernorm",
            "feed_forward_post_norm": "post_feedforward_layernorm",
        }
    else:
        # Behind attention, which is in front of the feed-forward layer.
        layer["feed_forward_norm"] = "post_attention_layernorm"
    return {
        "embedding": "model.embed_tokens",
        "softmax": "lm_head",
        "decoder.norm": "model.norm",
    } | _layers("decoder.layers", "model.layers.#", layer)


def falcon(config: TransformerConfig) -> dict[str, str]:
    has_two = config.block == "parallel" and config.parallel_norms == 2
    fused = "query_key_value"
    return {
        "embedding": "transformer.word_embeddings",
        "softmax": "lm_head",
        "decoder.norm": "transformer.ln_f",
    } | _layers(
        "decoder.layers",
        "transformer.h.#",
        {
            "attention_norm": "ln_attn" if has_two else "input_layernorm",
            **_attention("attention", "self_attention", (fused, fused, fused, "dense")),
            "feed_forward_norm": "ln_mlp" if has_two else "post_attention_layernorm",
            "feed_forward.wi": "mlp.dense_h_to_4h",
            "feed_forward.wo": "mlp.dense_4h_to_h",
        },
    )


def t5(config: TransformerConfig) -> dict[str, str]:
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias"

    def stack(at: int) -> dict[str, str]:
        wi = "wi_1" if config.gated else "wi"
        return {
            "attention_norm": "layer.0.layer_norm",
            **_attention("attention", "layer.0.SelfAttention", ("q", "k", "v", "o")),
            "feed_forward_norm": f"layer.{at}.layer_norm",
            "feed_forward.gate": f"layer.{at}.DenseReluDense.wi_0",
            "feed_forward.wi": f"layer.{at}.DenseReluDense.{wi}",
            "feed_forward.wo": f"layer.{at}.DenseReluDense.wo",
        }

    cross = {
        "cross_attention_norm": "layer.1.layer_norm",
        **_attention("cross_attention", "layer.1.EncDecAttention", ("q", "k", "v", "o")),
    }
    return {
        "embedding": "shared",
        "softmax": "lm_head",
        "encoder_positions": f"encoder.{bias}",
        "decoder.positions": f"decoder.{bias}",
        "encoder_norm": "encoder.final_layer_norm",
        "decoder.norm": "decoder.final_layer_norm",
        **_layers("encoder_layers", "encoder.block.#", stack(1)),
        **_layers("decoder.layers", "decoder.block.#", stack(2) | cross),
    }


def marian(config: TransformerConfig) -> dict[str, str]:
    ends = ("q_proj", "k_proj", "v_proj", "out_proj")
    layer = {
        **_attention("attention", "self_attn", ends),
        "attention_norm": "self_attn_layer_norm",
        "feed_forward.wi": "fc1",
        "feed_forward.wo": "fc2",
        "feed_forward_norm": "final_layer_norm",
    }
    cross = {
        **_attention("cross_attention", "encoder_attn", ends),
        "cross_attention_norm": "encoder_attn_layer_norm",
    }
    return {
        "embedding": "model.shared",
        "softmax": "lm_head",
        "logits_bias": "final_logits_bias",
        **_layers("encoder_layers", "model.encoder.layers.#", layer),
        **_layers("decoder.layers", "model.decoder.layers.#", layer | cross),
    }
