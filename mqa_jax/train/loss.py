"""What a batch's tokens cost: the forward pass over packed rows, and the loss of it.

Array letters: B batch   R readings of it   S source length   T target length   V vocabulary
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mqa_jax.data import OWN_IDS, SpecialIds
from mqa_jax.model.transformer import DecoderOnly, Model
from mqa_jax.train.optimizer import wide

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


def cross_entropy(
    logits_BTV: Array, targets_BT: Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Array, Array]:
    """Cross-entropy in nats, without a one-hot array of the vocabulary's size.

    Args:
      logits_BTV: taken in float32 at least.
      targets_BT: the ids that should come out.
      label_smoothing: the share of the target distribution that is spread over all of `V`.
      z_loss: weight of `logsumexp(logits) ** 2`, which keeps the logits from drifting.

    Returns:
      the loss to train on and the plain negative log-likelihood, both `[B, T]`.
    """
    # A mean over V, and a sum of exponentials, are not for bfloat16.
    logits_BTV = logits_BTV.astype(wide(logits_BTV))
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nll_BT = log_z_BT - target_BT
    uniform_BT = log_z_BT - jnp.mean(logits_BTV, axis=-1)
    loss_BT = (1 - label_smoothing) * nll_BT + label_smoothing * uniform_BT
    return loss_BT + z_loss * jnp.square(log_z_BT), nll_BT


def segments(tokens_BT: Array, ids: SpecialIds = OWN_IDS) -> tuple[Array, Array]:
    """Which sentence of its row each token is of, and which token of the sentence it is.

    On the device, so that what the host sends for each step is the tokens alone.

    Args:
      tokens_BT: sentences one behind the other, each up to its EOS, then padding.
      ids: of EOS and of padding.

    Returns:
      segment ids, from 1 and 0 for padding, and positions, from 0; both int32 `[B, T]`.
    """
    index_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    is_first_BT = (jnp.roll(tokens_BT, 1, axis=1) == ids.eos) | (index_T == 0)
    first_BT = jax.lax.cummax(jnp.where(is_first_BT, index_T, 0), axis=1)
    segment_ids_BT = jnp.cumsum(is_first_BT, axis=1, dtype=jnp.int32)
    is_token_BT = tokens_BT != ids.pad
    return jnp.where(is_token_BT, segment_ids_BT, 0), jnp.where(is_token_BT, index_T - first_BT, 0)


def predicted(tokens_BT: Array, ids: SpecialIds = OWN_IDS) -> Array:
    """Which tokens a model predicts, `[B, T]`: all but padding, and the first of a sentence that
    has nothing in front."""
    segment_ids_BT, positions_BT = segments(tokens_BT, ids)
    return (segment_ids_BT > 0) & ((positions_BT > 0) | (ids.bos is not None))


def apply(model: Model, batch: Batch, rngs: nnx.Rngs | None, ids: SpecialIds = OWN_IDS) -> Array:
    """Logits `[B, T, V]` of a batch.

    Args:
      model: with its weights.
      batch: `target_tokens`, int32 `[B, T]`, and for a translation `source_tokens`, `[B, S]`, as
        `mqa_jax.data.loader` makes them: sentences one behind the other, each up to its EOS, then
        padding. What the model is given to predict a token is BOS or the one before; where there
        is no BOS, nothing is predicted in the place of the first one.
      rngs: dropout is applied when given.
      ids: those of the batch that stand for no text.
    """
    targets_BT = batch["target_tokens"]
    segment_ids_BT, positions_BT = segments(targets_BT, ids)
    inputs_BT = jnp.roll(targets_BT, 1, axis=1)
    if ids.bos is None:
        # The first token is the first input, so the place before it is one of padding.
        segment_ids_BT = jnp.where(positions_BT == 0, 0, segment_ids_BT)
        positions_BT = jnp.maximum(positions_BT - 1, 0)
    else:
        inputs_BT = jnp.where(positions_BT == 0, ids.bos, inputs_BT)
    if isinstance(model, DecoderOnly):
        return model(inputs_BT, segment_ids=segment_ids_BT, positions=positions_BT, rngs=rngs)
    sources_BS = batch["source_tokens"]
    source_segment_ids_BS, source_positions_BS = segments(sources_BS, ids)
    return model(
        jnp.where(source_segment_ids_BS > 0, sources_BS, 0),
        inputs_BT,
        source_segment_ids=source_segment_ids_BS,
        target_segment_ids=segment_ids_BT,
        source_positions=source_positions_BS,
        target_positions=positions_BT,
        rngs=rngs,
    )


def token_losses(
    model: Model,
    batch: Batch,
    key: Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    r_drop: float = 0.0,
    teacher: Model | None = None,
    distillation: float = 0.0,
    ids: SpecialIds = OWN_IDS,
) -> tuple[Array, Array, Array]:
    """What a batch's target tokens cost in training.

    Args:
      model: with its weights.
      batch: as for `apply`.
      key: of dropout.
      label_smoothing: see `cross_entropy`.
      z_loss: likewise.
      r_drop: above 0 the batch is read twice, with other dropout masks, and that much of the
        Kullback-Leibler divergence between the two predictions, the mean of both ways, is added to
        the sum of their two losses: the alpha of R-Drop (Liang et al. 2021, equation 4). The mean
        of the two readings is returned, so half of that.
      teacher: with its weights; a model of the same ids, which reads the batch without dropout.
      distillation: the share of the loss that is the Kullback-Leibler divergence of the model's
        predictions from the teacher's (Hinton et al. 2015, at temperature 1); all else is the rest.
      ids: as for `apply`.

    Returns:
      the loss to train on and the plain negative log-likelihood, `[B, T]`, and logits, `[B, T, V]`,
      of the first reading where there are two.
    """
    readings = 2 if r_drop else 1
    # A row beside itself stays on the device that it is on.
    rows = {name: jnp.repeat(x, readings, axis=0) for name, x in batch.items()}
    logits_BTV = apply(model, rows, nnx.Rngs(dropout=key), ids)
    loss_BT, nll_BT = cross_entropy(
        logits_BTV, rows["target_tokens"], label_smoothing=label_smoothing, z_loss=z_loss
    )
    if teacher is None and not r_drop:
        return loss_BT, nll_BT, logits_BTV
    loss_BRT, nll_BRT, logits_BRTV = (
        x.reshape(-1, readings, *x.shape[1:]) for x in (loss_BT, nll_BT, logits_BTV)
    )
    loss_BT, log_p_BRTV = jnp.mean(loss_BRT, axis=1), _log_p(logits_BRTV)
    if r_drop:
        first_BTV, second_BTV = log_p_BRTV[:, 0], log_p_BRTV[:, 1]
        both_ways_BT = _divergence(first_BTV, second_BTV) + _divergence(second_BTV, first_BTV)
        loss_BT += r_drop / 4 * both_ways_BT
    if teacher is not None:
        wanted_BTV = jax.lax.stop_gradient(_log_p(apply(teacher, batch, None, ids)))
        far_BT = jnp.mean(_divergence(wanted_BTV[:, None], log_p_BRTV), axis=1)
        loss_BT = (1 - distillation) * loss_BT + distillation * far_BT
    return loss_BT, jnp.mean(nll_BRT, axis=1), logits_BRTV[:, 0]


def _log_p(logits: Array) -> Array:
    return jax.nn.log_softmax(logits.astype(wide(logits)))


def _divergence(log_p: Array, log_q: Array) -> Array:
    """Of distribution q from p, in nats (Kullback and Leibler)."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def loss_sums(
    loss_BT: Array, nll_BT: Array, logits_BTV: Array, batch: Batch, ids: SpecialIds
) -> Metrics:
    """Sums over the tokens that are predicted; unlike means, they add up over batches."""
    targets_BT = batch["target_tokens"]
    is_token_BT = predicted(targets_BT, ids)
    is_right_BT = is_token_BT & (jnp.argmax(logits_BTV, axis=-1) == targets_BT)
    # Counts as integers: float32 knows no odd number above 2 ** 24.
    return {
        "loss": jnp.sum(loss_BT, where=is_token_BT),
        "nll": jnp.sum(nll_BT, where=is_token_BT),
        "right": jnp.sum(is_right_BT, dtype=jnp.int32),
        "tokens": jnp.sum(is_token_BT, dtype=jnp.int32),
    }


def mean_metrics(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Sums over tokens to `loss`, `ln_perplexity`, `accuracy` and `tokens`.

    Args:
      sums: of a step; or numbers on the host, whose means are then taken in float64.
    """
    is_on_device = isinstance(sums["tokens"], Array)
    means = {name: jnp.float32(x) if is_on_device else np.float64(x) for name, x in sums.items()}
    tokens = means["tokens"].clip(1)
    return {
        "loss": means["loss"] / tokens,
        "ln_perplexity": means["nll"] / tokens,
        "accuracy": means["right"] / tokens,
        "tokens": sums["tokens"],
    }
