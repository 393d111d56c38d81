"""Trained models turned into cheaper ones: fewer key/value heads (`heads`).

Knows models, and nothing of where they come from or how they are trained."""

from mqa_jax.convert.heads import convert_attention, convert_heads

__all__ = ["convert_attention", "convert_heads"]
