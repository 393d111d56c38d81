"""Multi-query attention (Shazeer 2019) in JAX: attention modules, models and decoding."""

from mqa_jax.attention import (
    Attention,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    causal_mask,
    dot_product_attention,
    padding_mask,
    segment_mask,
)
from mqa_jax.attention.cache import CrossCache, KVCache, RingCache
from mqa_jax.attention.positions import RelativeBias, Rope
from mqa_jax.core.sharding import ShardingRules, make_mesh, on_mesh
from mqa_jax.decode.beam import beam_search
from mqa_jax.decode.generate import Generator
from mqa_jax.decode.prompts import left_aligned
from mqa_jax.decode.search import Decoded, greedy, sample
from mqa_jax.model.config import TransformerConfig
from mqa_jax.model.transformer import DecoderOnly, EncoderDecoder

__version__ = "0.2.0.dev0"

__all__ = [
    "Attention",
    "CrossCache",
    "Decoded",
    "DecoderOnly",
    "EncoderDecoder",
    "Generator",
    "GroupedQueryAttention",
    "KVCache",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "RelativeBias",
    "RingCache",
    "Rope",
    "ShardingRules",
    "TransformerConfig",
    "beam_search",
    "causal_mask",
    "dot_product_attention",
    "greedy",
    "left_aligned",
    "make_mesh",
    "on_mesh",
    "padding_mask",
    "sample",
    "segment_mask",
]
