"""Eight bits for a trained model: its weights, and the keys and values of its caches."""

import dataclasses

from flax import nnx

from mqa_jax.attention import Attention
from mqa_jax.attention.cache import check_cache_dtype
from mqa_jax.model.quantized import quantize_weights
from mqa_jax.model.transformer import DecoderOnly, EncoderDecoder, Model


def quantize(model: Model, scheme: str | None, *, cache_dtype: str | None = None) -> Model:
    """A model with its weights in eight bits, and all else of `model`, which stays as it is.

    Every weight that activations are multiplied with, the table of tokens and the softmax's too,
    becomes numbers of eight bits with a scale for each output; see `mqa_jax.core.quantized`.

    Args:
      model: any.
      scheme: "int8": what is multiplied with a weight is rounded to int8 as well, a scale for each
        row; "int8_weights": it is not; "fp8": as int8, in float8 (e4m3), for devices that multiply
        it. None: the weights stay as they are.
      cache_dtype: of keys and values in its caches: "int8" or "fp8", with a scale for each token
        and head, or a float's name; as it was when None.

    Raises:
      ValueError: an unknown scheme or dtype, a weight that is not finite, a model that is quantized
        already, or one that is neither an `EncoderDecoder` nor a `DecoderOnly`.
    """
    if not isinstance(model, EncoderDecoder | DecoderOnly):
        raise ValueError(
            f"a {type(model).__name__} is neither an EncoderDecoder nor a DecoderOnly, whose "
            "weights quantize knows"
        )
    quantized, config = nnx.clone(model), model.config
    if scheme is not None:
        if config.quantized is not None:
            raise ValueError(
                f"the model is quantized already ({config.quantized}): quantize the one that it "
                "was made of"
            )
        quantize_weights(quantized, scheme)
        config = dataclasses.replace(config, quantized=scheme)
    if cache_dtype is not None:
        dtype = check_cache_dtype("cache_dtype", cache_dtype)
        for _, module in nnx.iter_modules(quantized):
            if isinstance(module, Attention):
                module.cache_dtype = dtype
        config = dataclasses.replace(config, cache_dtype=cache_dtype)
    quantized.config = config
    return quantized
