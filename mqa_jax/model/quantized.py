"""A model's weights in eight bits, in their places."""

from flax import nnx

from mqa_jax.core.quantized import QuantizedWeight


def quantize_weights(model: nnx.Module, scheme: str) -> None:
    """Replaces, in a model, every weight that something is multiplied with.

    Norms, biases and tables of positions stay as they are: they are small, and added.

    Args:
      scheme: one of `mqa_jax.core.quantized.SCHEMES`.

    Raises:
      ValueError: an unknown scheme, or a weight that is not finite.
    """
    modules = [module for _, module in nnx.iter_modules(model) if hasattr(module, "PRODUCTS")]
    for module in modules:
        for name, num_inputs in module.PRODUCTS.items():
            weight = getattr(module, name)
            is_positions = weight is not None and weight.get_metadata().get("axes") == "PD"
            if weight is not None and not is_positions:
                setattr(module, name, QuantizedWeight(weight, num_inputs, scheme))
