"""The learning-rate schedule and the optimizers."""

import jax.numpy as jnp
import optax
from jax import Array


def rsqrt_schedule(
    learning_rate: float, total_steps: int, *, hold_steps: int, warmup_steps: int, decay_steps: int
) -> optax.Schedule:
    """`learning_rate / sqrt(max(step, hold_steps))`, with a ramp before and a linear decay behind.

    The paper's published configs have `learning_rate = 1`, `hold_steps = 10000`, no warm-up (which
    Adafactor does not need) and a linear decay over the last 20,000 steps.

    Args:
      warmup_steps: the rate rises linearly from 0 over that many steps.
      decay_steps: the rate falls linearly to 0 over the last that many of `total_steps`.
    """

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
    name: str, schedule: optax.Schedule, *, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Adafactor as the paper has it, or AdamW (betas 0.9 and 0.98, gradients clipped to norm 1).

    Raises:
      ValueError: another name.
    """
    if name == "adafactor":
        return optax.adafactor(schedule, weight_decay_rate=weight_decay or None)
    if name == "adamw":
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(schedule, b1=0.9, b2=0.98, eps=1e-9, weight_decay=weight_decay),
        )
    raise ValueError(f"optimizer {name!r} is not one of ['adafactor', 'adamw']")
