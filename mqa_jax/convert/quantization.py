"""Eight bits for a trained model's weights."""

import dataclasses

from flax import nnx

from mqa_jax.model.quantized import quantize_weights
from mqa_jax.model.transformer import DecoderOnly, EncoderDecoder, Model


def quantize(model: Model, scheme: str) -> Model:
    """A model with its weights in eight bits, and all else of `model`, which stays as it is.

    Every weight that activations are multiplied with, the table of tokens and the softmax's too,
    becomes numbers of eight bits with a scale for each output; see `mqa_jax.core.quantized`.

    Args:
      model: any.
      scheme: "int8": what is multiplied with a weight is rounded to int8 as well, a scale for each
        row; "int8_weights": it is not; "fp8": as int8, in float8 (e4m3), for devices that multiply
        it.

    Raises:
      ValueError: an unknown scheme, a weight that is not finite, a model that is quantized already,
        or one that is neither an `EncoderDecoder` nor a `DecoderOnly`.
    """
    if not isinstance(model, EncoderDecoder | DecoderOnly):
        raise ValueError(
            f"a {type(model).__name__} is neither an EncoderDecoder nor a DecoderOnly, whose "
            "weights quantize knows"
        )
    if model.config.quantized is not None:
        raise ValueError(
            f"the model is quantized already ({model.config.quantized}): quantize the one that it "
            "was made of"
        )
    quantized = nnx.clone(model)
    quantize_weights(quantized, scheme)
    quantized.config = dataclasses.replace(model.config, quantized=scheme)
    return quantized
