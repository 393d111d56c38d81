"""The paper's encoder-decoder with random weights, as it is compared with other libraries."""

import dataclasses
import statistics
import time
from collections.abc import Callable

from turns import Run

D_MODEL, D_FF, HEADS, HEAD_DIM, VOCAB = 1024, 4096, 8, 128, 32_000
D_FF_MULTI_QUERY = 5440  # As many parameters, as in the paper.
LAYERS = 6
CONTEXT, STEPS = 128, 32  # Tokens before, of the source too, and the steps that are timed.
EOS = 1


def ours(
    variant: str, precision: str, *, layers: int = LAYERS, context: int = CONTEXT
) -> Callable[[int, int], Run]:
    """What makes ready, for a number of rows and of beams, to decode `STEPS` tokens.

    They are behind `context` others, and of a source as long.
    """
    # Where the peers are installed apart, this is imported without JAX.
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mqa_jax import EncoderDecoder, TransformerConfig, beam_search, greedy
    from mqa_jax.convert import quantize
    from mqa_jax.core.devices import loop_options, product_options
    from mqa_jax.measure.cost import Precision

    of = Precision.of(precision)
    is_multi_query = variant == "multi_query"
    config = TransformerConfig(
        vocab_size=VOCAB,
        d_model=D_MODEL,
        d_ff=D_FF_MULTI_QUERY if is_multi_query else D_FF,
        num_layers=layers,
        num_heads=HEADS,
        num_kv_heads=1 if is_multi_query else HEADS,
        head_dim=HEAD_DIM,
        max_length=context + STEPS,
        dtype=of.dtype,
        param_dtype=of.dtype,
    )
    model = EncoderDecoder(config, rngs=nnx.Rngs(0))
    model = quantize(model, of.quantized, cache_dtype=of.cache_dtype)
    graphdef, params = nnx.split(model)

    def prepare(batch: int, beam_size: int) -> Run:
        encode = jax.jit(
            lambda params, ids: nnx.merge(graphdef, params).init_cross_cache(ids),
            compiler_options=product_options(params),
        )
        cross = encode(params, jnp.full((batch, context), 7))

        def decode(params, cache, cross, tokens_B):
            model = nnx.merge(graphdef, params)
            step_fn = lambda tokens, cache: model.decode(tokens, cache, cross)  # noqa: E731
            if beam_size == 1:
                return greedy(step_fn, cache, tokens_B, max_new_tokens=STEPS)
            options = dict(beam_size=beam_size, max_new_tokens=STEPS, eos_id=EOS)
            return beam_search(step_fn, cache, tokens_B, **options)

        program = jax.jit(
            decode,
            donate_argnums=1 if beam_size == 1 else (),
            compiler_options=loop_options(params, batch * beam_size),
        )
        tokens_B = jnp.full(batch, 5)
        cache = model.init_cache(batch, context + STEPS)

        def run() -> float:
            nonlocal cache
            cache = jax.block_until_ready(
                tuple(dataclasses.replace(c, length=jnp.full(batch, context)) for c in cache)
            )
            start = time.perf_counter()
            decoded = jax.block_until_ready(program(params, cache, cross, tokens_B))
            seconds = time.perf_counter() - start
            if int(decoded.steps) != STEPS:
                raise RuntimeError(f"{int(decoded.steps)} steps were taken, not {STEPS}")
            if beam_size == 1:
                cache = decoded.cache
            return seconds / STEPS

        run()
        return lambda: statistics.median(run() for _ in range(5))

    return prepare
