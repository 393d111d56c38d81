"""Multi-head, grouped-query and multi-query attention: the function (`functional`), its `masks`,
the modules (`module`), what decoding remembers (`cache`), and what runs on one platform alone
(`kernels`).

Knows nothing of models."""

from mqa_jax.attention.cache import BeamCache, CrossCache, KVCache, RingCache
from mqa_jax.attention.functional import dot_product_attention
from mqa_jax.attention.masks import causal_mask, padding_mask, segment_mask
from mqa_jax.attention.module import (
    Attention,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
)

__all__ = [
    "Attention",
    "BeamCache",
    "CrossCache",
    "GroupedQueryAttention",
    "KVCache",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "RingCache",
    "causal_mask",
    "dot_product_attention",
    "padding_mask",
    "segment_mask",
]
