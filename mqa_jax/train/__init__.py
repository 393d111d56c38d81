"""Training: `optimizer`, `state`, `step` and `setup` make the jitted update; `loop` runs it, with
`evaluate`, `checkpoint`, `metrics`, `processes` and `workdir` around it."""

from mqa_jax.core.extras import require

require("train", __name__)
