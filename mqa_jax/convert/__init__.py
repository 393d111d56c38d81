"""Trained models turned into cheaper ones: fewer key/value heads (`heads`), merged as `merges` has
it, by their weights or by what they make of a text (`calibrate`); weights in eight bits
(`quantization`).

Knows models, and nothing of where they come from or how they are trained."""

from mqa_jax.convert.calibrate import input_moments
from mqa_jax.convert.heads import convert_attention, convert_heads, kv_heads, wanted_kv_heads
from mqa_jax.convert.quantization import quantize

__all__ = [
    "convert_attention",
    "convert_heads",
    "input_moments",
    "kv_heads",
    "quantize",
    "wanted_kv_heads",
]
