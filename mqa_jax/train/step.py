"""The loss, and the train and eval steps.

Array letters: B batch   S source length   T target length   V vocabulary
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from mqa_jax.core.checks import check_integer, check_number
from mqa_jax.core.sharding import ShardingRules, on_mesh
from mqa_jax.data import OWN_IDS, SpecialIds
from mqa_jax.model.transformer import DecoderOnly, Model
from mqa_jax.train.optimizer import at_step, wide
from mqa_jax.train.state import MAX_SEED, TrainState

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


def dropout_key(seed: ArrayLike, step: ArrayLike) -> Array:
    """From which the dropout masks of a step are drawn."""
    return jax.random.fold_in(jax.random.key(seed), step)


def in_parts(batch: Batch, parts: int) -> Batch:
    """Arrays `[B, ...]` as `[parts, B / parts, ...]`, each row where it lies.

    Raises:
      ValueError: `parts` does not divide the rows.
    """

    def of(x: Array) -> Array:
        if x.shape[0] % parts:
            raise ValueError(
                f"a batch of {x.shape[0]} rows cannot be taken in {parts} parts: choose "
                "train.accumulate so that it divides train.batch_size"
            )
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(of, dict(batch))


def make_gradients(
    model: Model,
    mesh: Mesh,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    accumulate: int = 1,
    rules: ShardingRules | None = None,
    ids: SpecialIds = OWN_IDS,
) -> Callable[[nnx.State, Batch, Array], tuple[nnx.State, Metrics]]:
    """A function of parameters, batch and key of dropout to the gradients and the sums of the loss.

    The gradients are of the sum over tokens, not of the mean. Arguments as for `make_train_step`.
    """
    graphdef = nnx.graphdef(model)

    def loss_fn(params: nnx.State, batch: Batch, key: Array) -> tuple[Array, Metrics]:
        with on_mesh(mesh, rules or ShardingRules()):
            logits_BTV = apply(nnx.merge(graphdef, params), batch, nnx.Rngs(dropout=key), ids)
        loss_BT, nll_BT = cross_entropy(
            logits_BTV, batch["target_tokens"], label_smoothing=label_smoothing, z_loss=z_loss
        )
        sums = _sums(loss_BT, nll_BT, logits_BTV, batch, ids)
        return sums["loss"], sums

    def gradients_and_sums(
        params: nnx.State, batch: Batch, key: Array
    ) -> tuple[nnx.State, Metrics]:
        """Of the whole batch, from its parts; of the sums of the loss, since these add up."""
        gradient = jax.grad(loss_fn, has_aux=True)
        if accumulate == 1:
            return gradient(params, batch, key)

        def add(total: Any, part_and_key: tuple[Batch, Array]) -> tuple[Any, None]:
            gradients = gradient(params, *part_and_key)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradients), None

        parts = in_parts(batch, accumulate), jax.random.split(key, accumulate)
        first = jax.tree.map(lambda x: x[0], parts)
        # Not in the dtype of the weights: in bfloat16 a sum of 256 parts no longer grows.
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, wide(x)), jax.eval_shape(gradient, params, *first)
        )
        return jax.lax.scan(add, zeros, parts)[0]

    return gradients_and_sums


def make_update(
    optimizer: optax.GradientTransformation,
    gradients_and_sums: Callable[[nnx.State, Batch, Array], tuple[nnx.State, Metrics]],
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, Metrics]]:
    """The update of `make_train_step` as a function of state, batch and key of dropout, not jitted.

    Args:
      optimizer: what turns gradients into updates.
      gradients_and_sums: of `make_gradients`.
    """

    def update(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, Metrics]:
        gradients, sums = gradients_and_sums(state.params, batch, key)
        tokens = jnp.maximum(sums["tokens"], 1).astype(jnp.float32)
        # In the dtype of the weights, as any optimizer expects them.
        gradients = jax.tree.map(
            lambda x, weight: (x.astype(wide(x)) / tokens).astype(weight.dtype),
            gradients,
            state.params,
        )
        gradient_norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(wide(x)), gradients))
        is_finite = jnp.isfinite(gradient_norm) & jnp.isfinite(sums["loss"])
        opt_state = at_step(state.opt_state, state.step)
        updates, opt_state = optimizer.update(gradients, opt_state, state.params)
        params = jax.tree.map(
            lambda x, change: (x.astype(wide(x)) + change.astype(wide(x))).astype(x.dtype),
            state.params,
            updates,
        )
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        skipped = (~is_finite).astype(jnp.float32)
        metrics = mean_metrics(sums) | {"gradient_norm": gradient_norm, "skipped": skipped}
        return TrainState(state.step + 1, params, opt_state), metrics

    return update


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    *,
    seed: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    accumulate: int = 1,
    rules: ShardingRules | None = None,
    ids: SpecialIds = OWN_IDS,
) -> jax.stages.Wrapped:
    """The jitted update; the state handed in is donated.

    Dropout masks follow from `seed` and the step alone, so that a resumed run draws the same ones.
    Where the loss or a gradient is not finite the update is skipped: weights and optimizer stay as
    they are, and only the step, which is the position in the data, goes on.

    Args:
      model: its structure, from `init_state`.
      optimizer: what turns gradients into updates.
      state: whose shardings the new states keep; its values are not used.
      seed: of dropout.
      label_smoothing: see `cross_entropy`.
      z_loss: see `cross_entropy`.
      accumulate: gradients of so many parts of a batch are summed one after the other before the
        update, in float32, which saves memory; it must divide the rows of a batch.
      rules: those of the state; `ShardingRules()` when None.
      ids: those of the batches that stand for no text, as the tokenizer has them.

    Returns:
      a function of state and batch (see `apply`) to the new state and the metrics `loss`,
      `ln_perplexity` (both the mean a target token, in nats), `accuracy`, `gradient_norm`, `tokens`
      (target tokens) and `skipped` (1 for an update that was skipped, else 0).

    Raises:
      ValueError: a number out of its range, a state that is on no mesh, or (of the function
        returned) a batch that `accumulate` does not divide.
    """
    check_integer("seed", seed, least=0, most=MAX_SEED)
    check_integer("accumulate", accumulate)
    check_number("label_smoothing", label_smoothing, least=0, below=1)
    check_number("z_loss", z_loss, least=0)
    mesh = getattr(state.step.sharding, "mesh", None)
    if not isinstance(mesh, Mesh):
        raise ValueError(
            "the state must lie on a mesh, as init_state makes it; its step lies on "
            f"{state.step.sharding}"
        )
    gradients_and_sums = make_gradients(
        model,
        mesh,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        accumulate=accumulate,
        rules=rules,
        ids=ids,
    )
    update = make_update(optimizer, gradients_and_sums)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return update(state, batch, dropout_key(seed, state.step))

    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(
    model: Model,
    mesh: Mesh,
    rules: ShardingRules | None = None,
    ids: SpecialIds = OWN_IDS,
) -> Callable[[nnx.State, Batch], Metrics]:
    """A jitted function of parameters and batch to sums over tokens, for `mean_metrics`.

    Args:
      model: its structure, from `init_state`.
      mesh: where parameters and batches are.
      rules: those of the parameters; `ShardingRules()` when None.
      ids: as for `make_train_step`.
    """
    graphdef = nnx.graphdef(model)

    @jax.jit
    def eval_step(params: nnx.State, batch: Batch) -> Metrics:
        with on_mesh(mesh, rules or ShardingRules()):
            logits_BTV = apply(nnx.merge(graphdef, params), batch, None, ids)
        loss_BT, nll_BT = cross_entropy(logits_BTV, batch["target_tokens"])
        return _sums(loss_BT, nll_BT, logits_BTV, batch, ids)

    return eval_step


def _sums(
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
