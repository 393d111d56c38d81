"""The train and eval steps.

Array letters: B batch   T target length   V vocabulary
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from mqa_jax.core.checks import check_integer, check_number
from mqa_jax.core.devices import product_options
from mqa_jax.core.sharding import ShardingRules, on_mesh
from mqa_jax.data import OWN_IDS, SpecialIds
from mqa_jax.model.transformer import Model
from mqa_jax.train.loss import (
    Batch,
    Metrics,
    apply,
    cross_entropy,
    loss_sums,
    mean_metrics,
    token_losses,
)
from mqa_jax.train.optimizer import at_step, wide
from mqa_jax.train.state import MAX_SEED, TrainState


def dropout_key(seed: ArrayLike, step: ArrayLike) -> Array:
    """From which the dropout masks of a step are drawn."""
    return jax.random.fold_in(jax.random.key(seed), step)


def with_weights(model: Model | None, params: nnx.State | None) -> Model | None:
    """The model of a structure and its weights; none of none."""
    return None if model is None else nnx.merge(nnx.graphdef(model), params)


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
    r_drop: float = 0.0,
    teacher: Model | None = None,
    distillation: float = 0.0,
    accumulate: int = 1,
    rules: ShardingRules | None = None,
    ids: SpecialIds = OWN_IDS,
) -> Callable[..., tuple[nnx.State, Metrics]]:
    """A function of parameters, batch and key of dropout to the gradients and the sums of the loss.

    With a teacher its weights are one more argument of that function. The gradients are of the sum
    over tokens, not of the mean. Arguments as for `make_train_step`.
    """
    if (teacher is None) != (distillation == 0):
        has = "without" if teacher is None else "with"
        raise ValueError(f"distillation {distillation} {has} a teacher: they go together")
    graphdef = nnx.graphdef(model)

    def loss_fn(
        params: nnx.State, batch: Batch, key: Array, teacher_params: nnx.State | None
    ) -> tuple[Array, Metrics]:
        with on_mesh(mesh, rules or ShardingRules()):
            loss_BT, nll_BT, logits_BTV = token_losses(
                nnx.merge(graphdef, params),
                batch,
                key,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                r_drop=r_drop,
                teacher=with_weights(teacher, teacher_params),
                distillation=distillation,
                ids=ids,
            )
        sums = loss_sums(loss_BT, nll_BT, logits_BTV, batch, ids)
        return sums["loss"], sums

    def gradients_and_sums(
        params: nnx.State, batch: Batch, key: Array, teacher_params: nnx.State | None = None
    ) -> tuple[nnx.State, Metrics]:
        """Of the whole batch, from its parts; of the sums of the loss, since these add up."""
        gradient = jax.grad(loss_fn, has_aux=True)
        if accumulate == 1:
            return gradient(params, batch, key, teacher_params)

        def add(total: Any, part_and_key: tuple[Batch, Array]) -> tuple[Any, None]:
            gradients = gradient(params, *part_and_key, teacher_params)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradients), None

        parts = in_parts(batch, accumulate), jax.random.split(key, accumulate)
        first = jax.tree.map(lambda x: x[0], parts)
        # Not in the dtype of the weights: in bfloat16 a sum of 256 parts no longer grows.
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, wide(x)),
            jax.eval_shape(gradient, params, *first, teacher_params),
        )
        return jax.lax.scan(add, zeros, parts)[0]

    return gradients_and_sums


def make_update(
    optimizer: optax.GradientTransformation,
    gradients_and_sums: Callable[..., tuple[nnx.State, Metrics]],
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The update of `make_train_step` as a function of state, batch, key of dropout and, with a
    teacher, its weights; not jitted.

    Args:
      optimizer: what turns gradients into updates.
      gradients_and_sums: of `make_gradients`.
    """

    def update(
        state: TrainState, batch: Batch, key: Array, teacher_params: nnx.State | None = None
    ) -> tuple[TrainState, Metrics]:
        gradients, sums = gradients_and_sums(state.params, batch, key, teacher_params)
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
    r_drop: float = 0.0,
    teacher: Model | None = None,
    distillation: float = 0.0,
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
      r_drop: see `token_losses`.
      teacher: the structure of a model to learn from, too.
      distillation: its share of the loss, see `token_losses`.
      accumulate: gradients of so many parts of a batch are summed one after the other before the
        update, in float32, which saves memory; it must divide the rows of a batch.
      rules: those of the state; `ShardingRules()` when None.
      ids: those of the batches that stand for no text, as the tokenizer has them.

    Returns:
      a function of state, batch (see `apply`) and, with a teacher, its weights, to the new state
      and the metrics `loss`, `ln_perplexity` (both the mean a target token, in nats), `accuracy`,
      `gradient_norm`, `tokens` (target tokens) and `skipped` (1 for an update that was skipped,
      else 0).

    Raises:
      ValueError: a number out of its range, a state that is on no mesh, or (of the function
        returned) a batch that `accumulate` does not divide.
    """
    check_integer("seed", seed, least=0, most=MAX_SEED)
    check_integer("accumulate", accumulate)
    check_number("label_smoothing", label_smoothing, least=0, below=1)
    check_number("z_loss", z_loss, least=0)
    check_number("r_drop", r_drop, least=0)
    check_number("distillation", distillation, least=0, most=1)
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
        r_drop=r_drop,
        teacher=teacher,
        distillation=distillation,
        accumulate=accumulate,
        rules=rules,
        ids=ids,
    )
    update = make_update(optimizer, gradients_and_sums)

    def train_step(
        state: TrainState, batch: Batch, teacher_params: nnx.State | None = None
    ) -> tuple[TrainState, Metrics]:
        return update(state, batch, dropout_key(seed, state.step), teacher_params)

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
    graphdef, weights = nnx.split(model)

    @functools.partial(jax.jit, compiler_options=product_options(weights))
    def eval_step(params: nnx.State, batch: Batch) -> Metrics:
        with on_mesh(mesh, rules or ShardingRules()):
            logits_BTV = apply(nnx.merge(graphdef, params), batch, None, ids)
        loss_BT, nll_BT = cross_entropy(logits_BTV, batch["target_tokens"])
        return loss_sums(loss_BT, nll_BT, logits_BTV, batch, ids)

    return eval_step
