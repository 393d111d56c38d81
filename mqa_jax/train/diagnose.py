"""Why a step was skipped: which rows, which ids, which gradients are not finite.

Array letters: B batch   T target length   V vocabulary
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from mqa_jax.core.sharding import ShardingRules, on_mesh
from mqa_jax.data import OWN_IDS, SpecialIds
from mqa_jax.model.transformer import Model
from mqa_jax.train.loss import Batch, apply, predicted, segments, token_losses
from mqa_jax.train.step import dropout_key, in_parts, make_gradients, with_weights

SHOWN = 4  # Names, or rows, of each kind.
SENTENCES = ("the loss", "the predictions by --config.train.teacher")


def make_diagnosis(
    model: Model,
    mesh: Mesh,
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
) -> Callable[..., str]:
    """A function that does a step's work again and looks for what was not finite in it.

    Apart from the step, which would be slower for it. Arguments as for `make_train_step`.

    Returns:
      a function of parameters, batch, the position of the step, from 0, and, with a teacher, its
      weights, to one line of words. The parameters may be those of a later step: a skipped one
      leaves them as they are.
    """
    options: dict[str, Any] = dict(
        label_smoothing=label_smoothing, z_loss=z_loss, r_drop=r_drop, distillation=distillation
    )
    gradients_of = make_gradients(
        model, mesh, teacher=teacher, accumulate=accumulate, rules=rules, ids=ids, **options
    )
    graphdef, vocab_size = nnx.graphdef(model), model.config.vocab_size

    def look(
        params: nnx.State,
        batch: Batch,
        position: ArrayLike,
        teacher_params: nnx.State | None = None,
    ) -> dict[str, dict[str, Array]]:
        key = dropout_key(seed, position)

        def sentences(part_and_key: tuple[Batch, Array]) -> tuple[Array, Array]:
            """`[B]` each: the first sentence of a row for which the loss, and what the teacher
            predicts, is not finite, from 1; else 0."""
            part, key = part_and_key
            with on_mesh(mesh, rules or ShardingRules()):
                loss_BT, _, _ = token_losses(
                    nnx.merge(graphdef, params),
                    part,
                    key,
                    teacher=with_weights(teacher, teacher_params),
                    ids=ids,
                    **options,
                )
                is_taught_BT = jnp.ones(loss_BT.shape, bool)
                if (model := with_weights(teacher, teacher_params)) is not None:
                    is_taught_BT = jnp.all(jnp.isfinite(apply(model, part, None, ids)), axis=-1)
            segment_ids_BT, _ = segments(part["target_tokens"], ids)
            is_token_BT = predicted(part["target_tokens"], ids)
            of_loss_B, of_teacher_B = (
                _first(~is_good_BT & is_token_BT, segment_ids_BT)
                for is_good_BT in (jnp.isfinite(loss_BT), is_taught_BT)
            )
            return of_loss_B, of_teacher_B

        if accumulate == 1:
            found = sentences((batch, key))
        else:
            parts = in_parts(batch, accumulate), jax.random.split(key, accumulate)
            found = jax.tree.map(
                lambda x: jnp.moveaxis(x, 0, 1).reshape(-1), jax.lax.map(sentences, parts)
            )
        outside = {
            name: _first((tokens != ids.pad) & ((tokens < 0) | (tokens >= vocab_size)), tokens)
            for name, tokens in batch.items()
        }
        gradients, _ = gradients_of(params, batch, key, teacher_params)
        leaves = jax.tree_util.tree_leaves_with_path(gradients)
        return {
            "ids": outside,
            "sentences": dict(zip(SENTENCES, found, strict=True)),
            "gradients": {
                jax.tree_util.keystr(path, simple=True, separator="/"): jnp.all(jnp.isfinite(x))
                for path, x in leaves
            },
        }

    look = jax.jit(look, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def diagnose(
        params: nnx.State, batch: Batch, position: int, teacher_params: nnx.State | None = None
    ) -> str:
        found = jax.device_get(look(params, batch, np.int32(position), teacher_params))
        causes = []
        for name, ids in found["ids"].items():
            if rows := np.flatnonzero(ids).tolist():
                shown = _list([f"{row} ({ids[row]})" for row in rows])
                causes.append(f"{name} of rows {shown} have ids outside of {vocab_size}")
        for what, sentence in found["sentences"].items():
            if rows := np.flatnonzero(sentence).tolist():
                shown = _list([f"{row} (sentence {sentence[row]})" for row in rows])
                causes.append(f"{what} of rows {shown}")
        if names := [name for name, is_finite in found["gradients"].items() if not is_finite]:
            causes.append(f"the gradients of {_list(names)}")
        return "; ".join(causes) or "nothing that shows again with the weights of now"

    return diagnose


def _first(is_bad: Array, values: Array) -> Array:
    """`[B]`: of each row the value at the first place that is bad; 0 where none is."""
    index = jnp.argmax(is_bad, axis=1, keepdims=True)
    first = jnp.take_along_axis(values, index, axis=1)[:, 0]
    return jnp.where(jnp.any(is_bad, axis=1), first, 0)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
