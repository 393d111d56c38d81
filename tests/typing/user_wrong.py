"""What a type checker must find: a mistake on each line that says so. Checked, never run."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

import mqa_jax
from mqa_jax import TransformerConfig, causal_mask, dot_product_attention, greedy

rngs = nnx.Rngs(0)
x_BTD = jnp.ones((2, 3, 512))
attention = mqa_jax.MultiQueryAttention(512, num_heads=8, rngs=rngs)

mqa_jax.MultiQueryAttention(512, num_heads=8)  # wrong: rngs are missing
mqa_jax.MultiQueryAttention(512, num_heads="8", rngs=rngs)  # wrong: a number as text
mqa_jax.MultiQueryAttention(512, num_heads=8, windows=32, rngs=rngs)  # wrong: no such argument
mqa_jax.MultiQueryAttentions  # wrong: no such name # noqa: B018
attention(x_BTD, None, True)  # wrong: is_causal goes by its name
attention(x_BTD, mask="causal")  # wrong: a mask is an array
attention.init_cache(batch=2)  # wrong: the length is missing
wrong: str = attention(x_BTD)  # wrong: an array
y_BTD: Array = attention.prefill(x_BTD, attention.init_cache(2, 9))  # wrong: a cache, too
attention.decode(x_BTD)  # wrong: the cache is missing
dot_product_attention(x_BTD, x_BTD)  # wrong: values are missing
dot_product_attention(x_BTD, x_BTD, x_BTD, window="32")  # wrong: a number as text
causal_mask(x_BTD)  # wrong: positions of keys are missing
TransformerConfig(vocab_size=512)  # wrong: nearly all fields are missing
greedy(lambda tokens: tokens, {}, x_BTD, max_new_tokens=5)  # wrong: a step takes a cache
greedy(lambda tokens, cache: (tokens, cache), {}, x_BTD)  # wrong: how many tokens
