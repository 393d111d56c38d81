"""Fewer key/value heads for a trained model: those of each group become one.

Query heads stay as many as they were and, like the output, are only turned as the merge of keys
and values asks (`merges`). Adding them up, too, would be another function.

Array letters, those of `jax.nn.dot_product_attention`:
  N query heads   K key/value heads   H head dim   D model dim
  M heads of a group   b dimensions of a head that may be mixed
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mqa_jax.attention import Attention
from mqa_jax.attention.positions import Rope
from mqa_jax.convert.merges import Merge, Merged, mean, truncated
from mqa_jax.core.checks import check_integer
from mqa_jax.model.transformer import DecoderOnly, EncoderDecoder, Model

# Of the mean of a moment's diagonal, added to it: what text never shows is still weighed a little.
RIDGE = 1e-6


class Place(NamedTuple):
    """Where an attention is in a model.

    Attributes:
      part: the field of `TransformerConfig` that has its key/value heads.
      path: the names of attributes that lead to it, dots between them.
      layer: what it is an attribute of.
      name: of that attribute.
    """

    part: str
    path: str
    layer: Any
    name: str

    @property
    def attention(self) -> Attention:
        return getattr(self.layer, self.name)


def attentions(model: Model) -> Iterator[Place]:
    """Every attention of a model, those of the decoder first.

    Raises:
      ValueError: it is none of this package's two.
    """
    if not isinstance(model, EncoderDecoder | DecoderOnly):
        raise ValueError(
            f"a {type(model).__name__} is neither an EncoderDecoder nor a DecoderOnly: convert "
            "each Attention of a model of your own with convert_attention"
        )
    for i, layer in enumerate(model.decoder.layers):
        yield Place("num_kv_heads", f"decoder.layers.{i}.attention", layer, "attention")
        if isinstance(model, EncoderDecoder):
            path = f"decoder.layers.{i}.cross_attention"
            yield Place("cross_kv_heads", path, layer, "cross_attention")
    if isinstance(model, EncoderDecoder):
        for i, own in enumerate(model.encoder_layers):
            yield Place("encoder_kv_heads", f"encoder_layers.{i}.attention", own, "attention")


def kv_heads(model: Model) -> dict[str, int]:
    """The key/value heads of each part that a model has, by the field of `TransformerConfig`."""
    return {place.part: place.attention.key.shape[0] for place in attentions(model)}


def wanted_kv_heads(
    model: Model,
    num_kv_heads: int,
    encoder_kv_heads: int | None = None,
    cross_kv_heads: int | None = None,
) -> dict[str, int]:
    """`kv_heads` after a conversion; arguments as for `convert_heads`, `model` may be abstract.

    Raises:
      ValueError: as `convert_heads`, of its numbers of heads.
    """
    had = kv_heads(model)
    if not isinstance(model, EncoderDecoder):
        if (encoder_kv_heads, cross_kv_heads) != (None, None):
            raise ValueError(
                f"encoder_kv_heads={encoder_kv_heads}, cross_kv_heads={cross_kv_heads}: a "
                f"{type(model).__name__} has neither an encoder nor cross-attention"
            )
        wanted = dict(num_kv_heads=num_kv_heads)
    else:
        in_encoder = had["encoder_kv_heads"] if encoder_kv_heads is None else encoder_kv_heads
        in_cross = num_kv_heads if cross_kv_heads is None else cross_kv_heads
        wanted = dict(
            num_kv_heads=num_kv_heads, encoder_kv_heads=in_encoder, cross_kv_heads=in_cross
        )
    for part, heads in wanted.items():
        _check_divides(part, heads, had[part])
    return wanted


def convert_heads(
    model: Model,
    num_kv_heads: int,
    *,
    encoder_kv_heads: int | None = None,
    cross_kv_heads: int | None = None,
    merge: Merge = truncated,
    moments: Mapping[str, np.ndarray] | None = None,
    regroup: bool = False,
) -> Model:
    """A model with fewer key/value heads, and all else of `model`; `model` itself stays as it is.

    Args:
      model: any.
      num_kv_heads: of the decoder's self-attention.
      encoder_kv_heads: of the encoder; as many as it has when None, as in Ainslie et al. 2023.
      cross_kv_heads: of cross-attention; `num_kv_heads` when None.
      merge: what becomes of the heads of a group; see `mqa_jax.convert.merges`.
      moments: of `mqa_jax.convert.calibrate.input_moments`: heads are merged by what they make of
        that text; by their weights when None.
      regroup: as for `convert_attention`. Self-attention with T5's biases on its logits keeps the
        order of its heads: those are by head, and one table is all layers'.

    Raises:
      ValueError: a number of heads that does not divide those that there are, or is of a part that
        the model does not have; moments of another model; a merge that returns anything else than
        numbers of the right shapes; a `model` that is neither of this package's two.
    """
    wanted = wanted_kv_heads(model, num_kv_heads, encoder_kv_heads, cross_kv_heads)
    converted, config = nnx.clone(model), model.config
    places = list(attentions(converted))
    if moments is not None and set(moments) != {place.path for place in places}:
        raise ValueError(f"moments are of {sorted(moments)}, which are not the model's attentions")
    for part, path, layer, name in places:
        has_own_bias = config.positions == "relative" and name == "attention"
        attention = convert_attention(
            getattr(layer, name),
            wanted[part],
            merge=merge,
            moment=None if moments is None else moments[path],
            regroup=regroup and not has_own_bias,
        )
        setattr(layer, name, attention)
    converted.config = dataclasses.replace(config, **cast(dict[str, Any], wanted))
    return converted


def convert_attention(
    attention: Attention,
    num_kv_heads: int,
    *,
    merge: Merge = truncated,
    moment: np.ndarray | None = None,
    regroup: bool = False,
) -> Attention:
    """An attention module with fewer key/value heads; `attention` itself stays as it is.

    As many heads as before are the same weights. Keys that are normed (`qk_norm`), or turned by
    positions in a way of your own, can be turned no other way: their merge must not ask for it,
    and `mean` takes its place.

    Args:
      attention: any.
      num_kv_heads: how many key/value heads it will have, which must divide those that it has.
      merge: what becomes of the heads of a group; see `mqa_jax.convert.merges`.
      moment: `[D, D]`, the sum of the outer products of what keys and values are made of, to any
        factor; of `[x, 1]`, so `[D + 1, D + 1]`, where there are biases. What the merge is given
        is then as large, and as like, as what the heads make of such inputs. When None all inputs
        are as likely.
      regroup: heads that lose little as one come into one group, and not those that stand beside
        each other. The query heads then are in another order, too; so it is not for attention
        that is given a `bias` for each head.

    Raises:
      ValueError: `num_kv_heads` does not divide those that there are; a moment of another shape,
        or of no inputs; a merge that returns anything else than numbers of the right shapes;
        `attention` is of another class, or quantized.
    """
    if not isinstance(attention, Attention):
        raise ValueError(
            f"a {type(attention).__name__} is no mqa_jax.Attention: copy its weights into one, as "
            "docs/guides/converting.md does with Flax's"
        )
    if not isinstance(attention.key, nnx.Param):
        raise ValueError(
            "the attention's weights are in eight bits: convert the model that it was made of, and "
            "quantize what comes out"
        )
    had = attention.key.shape[0]
    _check_divides("num_kv_heads", num_kv_heads, had)
    converted = nnx.clone(attention)
    if num_kv_heads == had:
        return converted
    is_free = attention.key_norm is None and (
        attention.rope is None or isinstance(attention.rope, Rope)
    )
    is_turned = attention.rope is not None and is_free
    keys = _Heads(attention.key, attention.key_bias, merge if is_free else mean, is_turned, moment)
    values = _Heads(attention.value, attention.value_bias, merge, False, moment)
    groups = np.arange(had).reshape(num_kv_heads, -1)
    if regroup and num_kv_heads > 1:
        groups = _alike(keys.loss_of_pairs() + values.loss_of_pairs(), groups)
    order = groups.reshape(-1)
    converted.key, converted.key_bias, turns = keys.merged(groups)
    # Of a query the conjugate transpose, as `turns @ key` is asked by it.
    query_KGHD, query_shape = _by_head(attention.query, had)[order], attention.query.shape
    back_K1HH = turns.swapaxes(1, 2)[:, None]
    converted.query = _like(attention.query, (back_K1HH @ query_KGHD).reshape(query_shape))
    if attention.query_bias is not None:
        bias_KGH1 = _by_head(attention.query_bias, had)[order][..., None]
        bias_NH = (back_K1HH @ bias_KGH1).reshape(query_shape[:2])
        converted.query_bias = _like(attention.query_bias, bias_NH)
    converted.value, converted.value_bias, turns = values.merged(groups)
    out_DNH = np.asarray(attention.out[...], np.float64)
    d_model, num_heads, head_dim = out_DNH.shape
    out_DKGH = out_DNH.reshape(d_model, had, num_heads // had, head_dim)[:, order]
    turned_DKGH = np.einsum("DKGh,KhH->DKGH", out_DKGH, turns)
    converted.out = _like(attention.out, turned_DKGH.reshape(out_DNH.shape))
    return converted


def _check_divides(name: str, heads: int, had: int) -> None:
    if had % check_integer(name, heads):
        raise ValueError(
            f"{name}={heads} does not divide the {had} key/value heads that there are: each new "
            "one takes the place of as many"
        )


class _Heads:
    """The keys, or the values, of an attention, as a merge takes them.

    Args:
      weight: `[K, H, D]`.
      bias: `[K, H]`, or None.
      merge: of `mqa_jax.convert.merges`.
      is_turned: by positions, half of a head against the other half.
      moment: as for `convert_attention`.
    """

    def __init__(
        self,
        weight: nnx.Param,
        bias: nnx.Param | None,
        merge: Merge,
        is_turned: bool,
        moment: np.ndarray | None,
    ):
        self._weight, self._bias, self._merge = weight, bias, merge
        self._is_turned = is_turned
        heads_KHD = np.asarray(weight[...], np.float64)
        if bias is not None:  # What an input of 1 is multiplied with.
            bias_KH1 = np.asarray(bias[...], np.float64)[..., None]
            heads_KHD = np.concatenate([heads_KHD, bias_KH1], -1)
        self._root_DD = None if moment is None else _root(moment, heads_KHD.shape[-1])
        if self._root_DD is not None:
            heads_KHD = heads_KHD @ self._root_DD
        # What may be mixed with each other, `[K, b, D]`.
        self._blocks = [heads_KHD]
        if is_turned:
            real, imaginary = np.split(heads_KHD, 2, axis=1)
            heads_KhD = real + 1j * imaginary
            self._blocks = [heads_KhD[:, i : i + 1] for i in range(heads_KhD.shape[1])]

    def loss_of_pairs(self) -> np.ndarray:
        """What is lost of every two heads as one, as a part of what all of them are, `[K, K]`."""
        count = len(self._blocks[0])
        loss_KK = np.zeros((count, count))
        for i, j in itertools.combinations(range(count), 2):
            for block in self._blocks:
                pair = block[[i, j]]
                own, turns = _merged(self._merge, pair)
                loss_KK[[i, j], [j, i]] += np.sum(np.abs(pair - turns @ own) ** 2)
        return loss_KK / (sum(np.sum(np.abs(block) ** 2) for block in self._blocks) or 1.0)

    def merged(self, groups: np.ndarray) -> tuple[nnx.Param, nnx.Param | None, np.ndarray]:
        """One head for each of the groups, and the turns of the heads in the groups' order,
        `[K, H, H]`."""
        merged, turns = [], []
        for group in groups:
            own, turn = zip(
                *(_merged(self._merge, block[group]) for block in self._blocks), strict=True
            )
            if self._is_turned:
                own_hD = np.concatenate(own)
                merged.append(np.concatenate([own_hD.real, own_hD.imag]))
                turns.append(_as_matrices(np.concatenate(turn, axis=2)[:, 0]))
            else:
                merged.append(own[0])
                turns.append(turn[0])
        merged_KHD = np.stack(merged)
        if self._root_DD is not None:
            flat = merged_KHD.reshape(-1, merged_KHD.shape[-1])
            merged_KHD = np.linalg.solve(self._root_DD.T, flat.T).T.reshape(merged_KHD.shape)
        bias = self._bias
        if bias is not None:
            bias = _like(bias, merged_KHD[..., -1])
            merged_KHD = merged_KHD[..., :-1]
        return _like(self._weight, merged_KHD), bias, np.concatenate(turns)


def _merged(merge: Merge, heads_MbD: np.ndarray) -> Merged:
    """What `merge` makes of the heads of a group, looked at: it may be anybody's."""
    if not callable(merge):
        raise ValueError(
            f"merge must be a function, such as mqa_jax.convert.merges.truncated, not {merge!r}"
        )
    found = merge(heads_MbD)
    count, size, inputs = heads_MbD.shape
    wanted = [(size, inputs), (count, size, size)]
    is_pair = isinstance(found, tuple | list)
    shapes = [np.shape(array) for array in found] if is_pair else type(found).__name__
    if shapes != wanted:
        raise ValueError(
            f"merge must return the merged head and the turns, of the shapes {wanted} for heads of "
            f"{heads_MbD.shape}, and returned {shapes}"
        )
    own, turns = map(np.asarray, found)
    if not (np.isfinite(own).all() and np.isfinite(turns).all()):
        raise ValueError("merge returned what are no numbers: are the weights that it was given?")
    return own, turns


def _root(moment: np.ndarray, inputs: int) -> np.ndarray:
    """`R` of `R @ R.T`, which is the moment and a little more."""
    moment_DD = np.asarray(moment, np.float64)
    if moment_DD.shape != (inputs, inputs):
        raise ValueError(
            f"moment must be [D, D], with biases [D + 1, D + 1], so {[inputs, inputs]}, and is "
            f"{list(moment_DD.shape)}"
        )
    power = np.trace(moment_DD) / inputs
    if not (np.isfinite(moment_DD).all() and power > 0):
        raise ValueError("moment is of no inputs, or of some that are no numbers")
    # Of a moment that was added up in float32 the small ones may be less than 0, by more than a
    # share of the mean makes up for where a few are much larger than the rest.
    powers_D, vectors_DD = np.linalg.eigh((moment_DD + moment_DD.T) / 2)
    return vectors_DD * np.sqrt(np.maximum(powers_D, 0.0) + RIDGE * power)


def _alike(loss_KK: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """Groups of the heads that lose least as one, found greedily; those that stand `beside` each
    other where that finds none better."""
    left, groups = list(range(len(loss_KK))), list[list[int]]()
    while left:
        pairs = itertools.combinations(left, 2)
        group = [*min(pairs, key=lambda pair: loss_KK[pair[0], pair[1]])]
        while len(group) < beside.shape[1]:
            rest = [head for head in left if head not in group]
            group.append(min(rest, key=lambda head: loss_KK[head, group].sum()))
        groups.append(sorted(group))
        left = [head for head in left if head not in group]

    found = np.array(sorted(groups))
    was, now = (
        sum(loss_KK[np.ix_(group, group)].sum() for group in each) for each in (beside, found)
    )
    return found if now < was else beside


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
