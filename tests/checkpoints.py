"""Tiny checkpoints of every family.

The configs are of version 4, as nearly all files of the hub are.
"""

import functools
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy
import tokenizers

# Prompt, or source, and target ids of the golden logits.
IDS = [3, 17, 5, 29, 11, 2, 23]
TARGETS = [0, 7, 19, 4, 13]

_GPT2 = dict(vocab_size=31, n_embd=20, n_head=5, n_layer=2, n_positions=11)
_LLAMA = dict(
    vocab_size=31,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    intermediate_size=29,
    max_position_embeddings=37,
    rms_norm_eps=1e-3,
    rope_theta=100.0,
)
_T5 = dict(
    vocab_size=31,
    d_model=22,
    d_kv=7,
    d_ff=29,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=3,
    relative_attention_num_buckets=6,
    relative_attention_max_distance=7,
    layer_norm_epsilon=1e-3,
    decoder_start_token_id=0,
)
_FALCON = dict(
    vocab_size=31,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    layer_norm_epsilon=1e-3,
    alibi=False,
    bias=False,
)

CONFIGS = {
    "gpt2": dict(_GPT2, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
    "gpt_bigcode": dict(
        _GPT2, model_type="gpt_bigcode", architectures=["GPTBigCodeForCausalLM"], n_inner=43
    ),
    "gpt_bigcode_heads": dict(
        _GPT2,
        model_type="gpt_bigcode",
        architectures=["GPTBigCodeForCausalLM"],
        multi_query=False,
        activation_function="gelu",
    ),
    "llama": dict(
        _LLAMA,
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        attention_bias=True,
        rope_scaling=dict(
            rope_type="llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=2.0,
            original_max_position_embeddings=13,
        ),
        tie_word_embeddings=False,
    ),
    "llama_linear": dict(
        _LLAMA,
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        mlp_bias=True,
        rope_scaling=dict(type="linear", factor=3.0),
        tie_word_embeddings=True,
    ),
    "mistral": dict(
        _LLAMA,
        model_type="mistral",
        architectures=["MistralForCausalLM"],
        head_dim=6,
        sliding_window=3,
        tie_word_embeddings=False,
    ),
    "qwen2": dict(
        _LLAMA,
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        use_sliding_window=False,
        sliding_window=2,
        tie_word_embeddings=True,
    ),
    "qwen2_windows": dict(
        _LLAMA,
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        use_sliding_window=True,
        sliding_window=3,
        max_window_layers=1,
        tie_word_embeddings=False,
    ),
    "qwen3": dict(
        _LLAMA,
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        head_dim=10,
        tie_word_embeddings=True,
    ),
    "starcoder2": dict(
        {key: value for key, value in _LLAMA.items() if key != "rms_norm_eps"},
        model_type="starcoder2",
        architectures=["Starcoder2ForCausalLM"],
        norm_epsilon=1e-3,
        sliding_window=4,
    ),
    "gemma": dict(
        _LLAMA | dict(num_key_value_heads=1),
        model_type="gemma",
        architectures=["GemmaForCausalLM"],
        head_dim=8,
        hidden_act="gelu",
        hidden_activation=None,
    ),
    "gemma2": dict(
        _LLAMA,
        model_type="gemma2",
        architectures=["Gemma2ForCausalLM"],
        head_dim=8,
        query_pre_attn_scalar=11,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        sliding_window=3,
    ),
    "falcon_7b": dict(_FALCON, model_type="falcon", architectures=["FalconForCausalLM"]),
    "falcon_40b": dict(
        _FALCON,
        model_type="falcon",
        architectures=["FalconForCausalLM"],
        new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    "falcon_11b": dict(
        _FALCON,
        model_type="falcon",
        architectures=["FalconForCausalLM"],
        new_decoder_architecture=True,
        num_kv_heads=3,
        num_ln_in_parallel_attn=1,
        ffn_hidden_size=41,
    ),
    "falcon_sequential": dict(
        _FALCON | dict(bias=True),
        model_type="falcon",
        architectures=["FalconForCausalLM"],
        parallel_attn=False,
        multi_query=False,
    ),
    "t5": dict(_T5, model_type="t5", architectures=["T5ForConditionalGeneration"]),
    "t5_gated": dict(
        _T5,
        model_type="t5",
        architectures=["T5ForConditionalGeneration"],
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "mt5": dict(
        _T5,
        model_type="mt5",
        architectures=["MT5ForConditionalGeneration"],
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "marian": dict(
        model_type="marian",
        architectures=["MarianMTModel"],
        vocab_size=31,
        decoder_vocab_size=31,
        d_model=20,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=5,
        decoder_attention_heads=5,
        encoder_ffn_dim=29,
        decoder_ffn_dim=29,
        max_position_embeddings=17,
        activation_function="swish",
        scale_embedding=True,
        pad_token_id=30,
        eos_token_id=0,
        decoder_start_token_id=30,
        forced_eos_token_id=0,
    ),
}


def values(name: str, shape: list[int]) -> np.ndarray:
    """The values of a weight, which follow from its name; of about the size that they have."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    deviation = 1.0 if len(shape) < 2 or "embed" in name else shape[-1] ** -0.5
    return np.asarray(0.5 * normal * deviation, np.float32)


@functools.cache
def golden() -> dict:
    return json.loads((Path(__file__).parent / "hub" / "golden.json").read_text())


def tensors(name: str) -> dict[str, np.ndarray]:
    return {key: values(key, shape) for key, shape in golden()[name]["tensors"].items()}


def write(directory: Path, name: str, **changes) -> Path:
    """A checkpoint of `CONFIGS` in `directory`, with other keys in its config, None for absent."""
    config = {key: value for key, value in (CONFIGS[name] | changes).items() if value is not None}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors(name), directory / "model.safetensors")
    return directory


WORDS = {f"w{i}": i for i in range(31)}


def write_words(directory: Path, template: str | None = None) -> Path:
    """A tokenizer into a checkpoint's directory, whose tokens are words, `w0` to `w30`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if template:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("w1", 1)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    """A file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
