"""Fewer key/value heads for a trained model: those of each group become one.

Query heads stay as many as they were and, like the output, are only turned as the merge of keys
and values asks (`merges`). Adding them up, too, would be another function.

Array letters, those of `jax.nn.dot_product_attention`:
  N query heads   K key/value heads   H head dim   D model dim
  M heads of a group   b dimensions of a head that may be mixed
"""

import dataclasses
import functools
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mqa_jax.attention import Attention
from mqa_jax.attention.positions import Rope
from mqa_jax.convert.merges import Merge, mean
from mqa_jax.core.checks import check_integer
from mqa_jax.model.transformer import EncoderDecoder, Model


def convert_heads(
    model: Model,
    num_kv_heads: int,
    *,
    encoder_kv_heads: int | None = None,
    cross_kv_heads: int | None = None,
    merge: Merge = mean,
) -> Model:
    """A model with fewer key/value heads, and all else of `model`; `model` itself stays as it is.

    Args:
      model: any.
      num_kv_heads: of the decoder's self-attention.
      encoder_kv_heads: of the encoder; as many as it has when None, as in Ainslie et al. 2023.
      cross_kv_heads: of cross-attention; `num_kv_heads` when None.
      merge: what becomes of the heads of a group; see `mqa_jax.convert.merges`.

    Raises:
      ValueError: a number of heads that does not divide those that there are, or is of a part that
        the model does not have.
    """
    config, is_translation = model.config, isinstance(model, EncoderDecoder)
    if not is_translation and (encoder_kv_heads, cross_kv_heads) != (None, None):
        raise ValueError(
            f"encoder_kv_heads={encoder_kv_heads}, cross_kv_heads={cross_kv_heads}: a "
            f"{type(model).__name__} has neither an encoder nor cross-attention"
        )
    convert = functools.partial(convert_attention, merge=merge)
    converted = nnx.clone(model)
    parts = dict(num_kv_heads=num_kv_heads)
    for layer in converted.decoder.layers:
        layer.attention = convert(layer.attention, num_kv_heads)
    if isinstance(converted, EncoderDecoder):
        had = config.encoder_kv_heads or config.num_kv_heads
        in_encoder = had if encoder_kv_heads is None else encoder_kv_heads
        in_cross = num_kv_heads if cross_kv_heads is None else cross_kv_heads
        for layer in converted.decoder.layers:
            layer.cross_attention = convert(layer.cross_attention, in_cross)
        for encoder_layer in converted.encoder_layers:
            encoder_layer.attention = convert(encoder_layer.attention, in_encoder)
        parts |= dict(encoder_kv_heads=in_encoder, cross_kv_heads=in_cross)
    converted.config = dataclasses.replace(config, **cast(dict[str, Any], parts))
    return converted


def convert_attention(attention: Attention, num_kv_heads: int, *, merge: Merge = mean) -> Attention:
    """An attention module with fewer key/value heads; `attention` itself stays as it is.

    As many heads as before are the same weights. Keys that are normed (`qk_norm`), or turned by
    positions in a way of your own, can be turned no other way: their merge must not ask for it,
    and `mean` takes its place.

    Args:
      attention: any.
      num_kv_heads: how many key/value heads it will have, which must divide those that it has.
      merge: what becomes of the heads of a group; see `mqa_jax.convert.merges`.

    Raises:
      ValueError: `num_kv_heads` does not divide those that there are.
    """
    had = attention.key.shape[0]
    if had % check_integer("num_kv_heads", num_kv_heads):
        raise ValueError(
            f"num_kv_heads={num_kv_heads} does not divide the {had} key/value heads that there "
            "are: each new one takes the place of as many"
        )
    converted = nnx.clone(attention)
    if num_kv_heads == had:
        return converted
    is_free = attention.key_norm is None and (
        attention.rope is None or isinstance(attention.rope, Rope)
    )
    turned = attention.rope is not None and is_free
    weight, bias, turns = _merged(
        attention.key, attention.key_bias, num_kv_heads, merge if is_free else mean, turned
    )
    converted.key, converted.key_bias = weight, bias
    # Of a query the conjugate transpose, as `turns @ key` is asked by it.
    query_KGHD, query_shape = _by_head(attention.query, had), attention.query.shape
    back_K1HH = turns.swapaxes(1, 2)[:, None]
    converted.query = _like(attention.query, (back_K1HH @ query_KGHD).reshape(query_shape))
    if attention.query_bias is not None:
        bias_KGH1 = _by_head(attention.query_bias, had)[..., None]
        bias_NH = (back_K1HH @ bias_KGH1).reshape(query_shape[:2])
        converted.query_bias = _like(attention.query_bias, bias_NH)
    weight, bias, turns = _merged(
        attention.value, attention.value_bias, num_kv_heads, merge, is_turned=False
    )
    converted.value, converted.value_bias = weight, bias
    out_DNH = np.asarray(attention.out[...], np.float64)
    d_model, num_heads, head_dim = out_DNH.shape
    out_DKGH = out_DNH.reshape(d_model, had, num_heads // had, head_dim)
    turned_DKGH = np.einsum("DKGh,KhH->DKGH", out_DKGH, turns)
    converted.out = _like(attention.out, turned_DKGH.reshape(out_DNH.shape))
    return converted


def _merged(
    weight: nnx.Param,
    bias: nnx.Param | None,
    num_kv_heads: int,
    merge: Merge,
    is_turned: bool,
) -> tuple[nnx.Param, nnx.Param | None, np.ndarray]:
    """Keys or values of fewer heads, and the turns of those that there were, `[K, H, H]`.

    Args:
      is_turned: by positions, half of a head against the other half.
    """
    heads_KHD = np.asarray(weight[...], np.float64)
    if bias is not None:  # What an input of 1 is multiplied with.
        heads_KHD = np.concatenate([heads_KHD, np.asarray(bias[...], np.float64)[..., None]], -1)
    had, head_dim, inputs = heads_KHD.shape
    groups = heads_KHD.reshape(num_kv_heads, had // num_kv_heads, head_dim, inputs)
    merged, turns = [], []
    for heads_MHD in groups:
        if is_turned:
            halves = heads_MHD[:, : head_dim // 2], heads_MHD[:, head_dim // 2 :]
            heads_MhD = halves[0] + 1j * halves[1]
            pairs = [merge(heads_MhD[:, i : i + 1]) for i in range(head_dim // 2)]
            own_hD = np.concatenate([own for own, _ in pairs])
            turn_Mh = np.concatenate([turn[:, :, 0] for _, turn in pairs], axis=1)
            merged.append(np.concatenate([own_hD.real, own_hD.imag]))
            turns.append(_as_matrices(turn_Mh))
        else:
            own_HD, turn_MHH = merge(heads_MHD)
            merged.append(own_HD)
            turns.append(turn_MHH)
    merged_KHD = np.stack(merged)
    if bias is not None:
        bias = _like(bias, merged_KHD[..., -1])
        merged_KHD = merged_KHD[..., :-1]
    return _like(weight, merged_KHD), bias, np.concatenate(turns)


def _as_matrices(turn_Mh: np.ndarray) -> np.ndarray:
    """Complex factors of halves as the products with matrices that they are, `[M, H, H]`."""
    real, imaginary = (np.apply_along_axis(np.diag, 1, x) for x in (turn_Mh.real, turn_Mh.imag))
    return np.block([[real, -imaginary], [imaginary, real]])


def _by_head(weight: nnx.Param, num_kv_heads: int) -> np.ndarray:
    """`[K, G, ...]` of `[N, ...]`."""
    array = np.asarray(weight[...], np.float64)
    return array.reshape(num_kv_heads, -1, *array.shape[1:])


def _like(weight: nnx.Param, array: np.ndarray) -> nnx.Param:
    """A parameter of new numbers, of the dtype and the axes of another."""
    return cast(nnx.Param, weight.replace(jnp.asarray(array, weight[...].dtype)))
