"""What a user writes, and a type checker must find nothing wrong with. Checked, never run."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import mqa_jax
from mqa_jax import (
    Attention,
    CrossCache,
    Decoded,
    DecoderOnly,
    EncoderDecoder,
    Generator,
    GroupedQueryAttention,
    KVCache,
    MultiHeadAttention,
    MultiQueryAttention,
    RelativeBias,
    RingCache,
    Rope,
    ShardingRules,
    TransformerConfig,
    beam_search,
    causal_mask,
    dot_product_attention,
    greedy,
    left_aligned,
    make_mesh,
    on_mesh,
    padding_mask,
    sample,
    segment_mask,
)

version: str = mqa_jax.__version__


class Block(nnx.Module):
    """Attention in a module of the user's own."""

    def __init__(self, attention: Attention):
        self.attention = attention

    def __call__(self, x_BTD: Array) -> Array:
        return x_BTD + self.attention(x_BTD, is_causal=True)


def modules(x_BTD: Array, memory_BSD: Array) -> Array:
    rngs = nnx.Rngs(0)
    blocks = [
        Block(MultiQueryAttention(512, num_heads=8, rngs=rngs)),
        Block(MultiHeadAttention(512, num_heads=8, window=32, dtype=jnp.bfloat16, rngs=rngs)),
        Block(GroupedQueryAttention(512, num_heads=8, num_kv_heads=2, rngs=rngs)),
        Block(Attention(512, 8, 2, 64, dropout_rate=0.1, param_dtype="bfloat16", rngs=rngs)),
        Block(Attention(512, 8, 2, 64, rope=Rope(theta=1e6), qk_norm=True, rngs=rngs)),
    ]
    x_BTD = blocks[1].attention(x_BTD, bias=RelativeBias(8, distance=64, rngs=rngs))
    for block in blocks:
        x_BTD = block(x_BTD)
    return blocks[0].attention(
        x_BTD, memory_BSD, mask=padding_mask(jnp.array([3, 5]), 7), rngs=rngs
    )


def step_by_step(attention: MultiQueryAttention, x_BTD: Array) -> Array:
    cache = attention.init_cache(batch=2, length=32)
    _, cache = attention.prefill(x_BTD[:, :9], cache)
    y_BTD, cache = attention.decode(x_BTD[:, 9:], cache)
    assert isinstance(cache, KVCache | RingCache)
    return y_BTD


def functions(query_BTNH: Array, key_BSKH: Array, positions_BT: Array) -> Array:
    mask: Array = causal_mask(positions_BT, positions_BT, window=32)
    mask = mask & segment_mask(positions_BT, positions_BT)
    local = dot_product_attention(query_BTNH, key_BSKH, key_BSKH, window=32, scale=0.5)
    scale = jnp.float32(0.5)  # A number that is learnt, perhaps.
    return local + dot_product_attention(query_BTNH, key_BSKH, key_BSKH, mask=mask, scale=scale)


def own_model(weight_VD: Array) -> list[Decoded]:
    def step(tokens_B: Array, cache: Array) -> tuple[Array, Array]:
        return weight_VD[tokens_B] @ weight_VD.T, cache + 1

    cache, tokens_B = jnp.zeros(2), jnp.zeros(2, jnp.int32)
    return [
        greedy(step, cache, tokens_B, max_new_tokens=5),
        sample(step, cache, tokens_B, key=jax.random.key(0), max_new_tokens=5, top_p=0.9),
        beam_search(step, cache, tokens_B, beam_size=4, max_new_tokens=5, eos_id=1),
        beam_search(
            step, cache, tokens_B, beam_size=4, max_new_tokens=5, eos_id=[1, 2], alpha=cache[0]
        ),
    ]


def models(ids_BT: Array) -> list[list[int]]:
    config = TransformerConfig(
        vocab_size=512,
        d_model=64,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=1,
        head_dim=16,
        max_length=128,
    )
    translator = EncoderDecoder(config, rngs=nnx.Rngs(0))
    language_model = DecoderOnly(config, rngs=nnx.Rngs(0))
    logits: Array = language_model(ids_BT)
    logits = translator(ids_BT, ids_BT)
    del logits
    generate = Generator(language_model, search=greedy, batch_size=2, bos_id=1)
    lengths_B: Array = jnp.array([2, 3])
    ids_BT = left_aligned(ids_BT, lengths_B)
    return generate.tokens(nnx.state(language_model), [[1, 5], np.array([1, 6, 7])])


def caches(cross: CrossCache) -> CrossCache:
    return cross


def sharded() -> DecoderOnly:
    with on_mesh(make_mesh(data=1, tensor=-1), ShardingRules(B=("data",))):
        return DecoderOnly(TransformerConfig(512, 64, 128, 2, 4, 1, 16, 128), rngs=nnx.Rngs(0))
