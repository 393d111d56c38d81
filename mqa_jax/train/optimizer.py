"""The learning-rate schedule and the optimizers."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mqa_jax.core.checks import check_integer, check_number

OPTIMIZERS = ("adafactor", "adamw")


def rsqrt_schedule(
    learning_rate: float, total_steps: int, *, hold_steps: int, warmup_steps: int, decay_steps: int
) -> optax.Schedule:
    """`learning_rate / sqrt(max(step, hold_steps))`, with a ramp before and a linear decay behind.

    The paper's published configs have `learning_rate = 1`, `hold_steps = 10000`, no warm-up (which
    Adafactor does not need) and a linear decay over the last 20,000 steps.

    Args:
      learning_rate: 0 or more.
      total_steps: where the decay ends.
      hold_steps: the rate is level until then.
      warmup_steps: the rate rises linearly from 0 over that many steps.
      decay_steps: the rate falls linearly to 0 over the last that many of `total_steps`.

    Raises:
      ValueError: a number that is negative, NaN or infinite, or no total.
    """
    check_number("learning_rate", learning_rate, least=0)
    check_integer("total_steps", total_steps)
    check_integer("hold_steps", hold_steps, least=0)
    check_integer("warmup_steps", warmup_steps, least=0)
    check_integer("decay_steps", decay_steps, least=0)

    def schedule(step: Array) -> Array:
        step = jnp.asarray(step, jnp.float32)
        rate = learning_rate / jnp.sqrt(jnp.maximum(step, float(max(hold_steps, 1))))
        if warmup_steps:
            rate *= jnp.minimum(1.0, (step + 1) / warmup_steps)
        if decay_steps:
            rate *= jnp.clip((total_steps - step) / decay_steps, 0.0, 1.0)
        return rate

    return schedule


def build_optimizer(
    name: str, schedule: optax.Schedule | float, *, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Adafactor as the paper has it, or AdamW (betas 0.9 and 0.98, gradients clipped to norm 1).

    All is computed, and all moments are kept, in float32 at least, whatever the weights are in.

    Args:
      name: "adafactor" or "adamw".
      schedule: the learning rate by step, counted by the state, see `at_step`; or one rate.
      weight_decay: the share of each weight that a step takes away, times the learning rate
        (decoupled, Loshchilov and Hutter 2019); `decays` says of which weights.

    Raises:
      ValueError: another name; a rate or a decay that is negative, NaN or infinite.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is not one of {sorted(OPTIMIZERS)}")
    if not callable(schedule):
        schedule = optax.constant_schedule(check_number("learning_rate", schedule, least=0))
    rate = optax.scale_by_learning_rate(schedule)
    decay = optax.identity()
    if check_number("weight_decay", weight_decay, least=0):
        decay = optax.add_decayed_weights(weight_decay, mask=decays)
    # In this nesting the state has the same paths as that of Optax's own `adafactor` and `adamw`.
    if name == "adafactor":
        scales = optax.chain(optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms(), decay)
        return _in_float32(optax.chain(optax.scale_by_factored_rms(), scales, rate))
    adam = optax.scale_by_adam(b1=0.9, b2=0.98, eps=1e-9)
    adamw = optax.chain(adam, decay, rate)
    return _in_float32(optax.chain(optax.clip_by_global_norm(1.0), adamw))


def decays(params: Any) -> Any:
    """Which weights weight decay holds for: all but vectors (norms, biases) and positions.

    Args:
      params: a tree of arrays. What lies under a name `positions` is positions; a bias, of
        whatever rank, has a name that ends in `bias`.

    Returns:
      a bool for each array, in the same tree.
    """

    def of(path: tuple, x: Array) -> bool:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return x.ndim > 1 and not any(n == "positions" or n.endswith("bias") for n in names)

    return jax.tree_util.tree_map_with_path(of, params)


def at_step(opt_state: optax.OptState, step: Array) -> optax.OptState:
    """The state with every schedule at `step`, whatever number of updates it has counted.

    An update that is skipped leaves the state as it was: by its own count the rate would not be
    that of the step from then on, and a decay would not end with the run.
    """

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda x: x._replace(count=step) if is_schedule(x) else x, opt_state, is_leaf=is_schedule
    )


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` with state, arithmetic and updates in float32 at least.

    Optax keeps moments in the dtype of the weights: in bfloat16 a moving average of hundreds of
    steps stops moving, since what a step adds is less than half of its last bit.
    """

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(wide(x)), tree)

    def init(params: Any) -> Any:
        return optimizer.init(widen(params))

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return optimizer.update(widen(gradients), state, widen(params))

    return optax.GradientTransformation(init, update)


def wide(x: Any) -> Any:
    """The dtype that sums of `x` are taken in: float32 for a narrower float, else its own."""
    is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
    return jnp.dtype(jnp.float32) if is_narrow else x.dtype
