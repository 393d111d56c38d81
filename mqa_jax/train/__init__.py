"""Training: `optimizer`, `state`, `loss`, `step` and `setup` make the jitted update; `loop` runs
it, with `config`, `evaluate`, `checkpoint`, `meter`, `metrics`, `diagnose`, `processes`,
`progress`, `npz` and `workdir`."""

from mqa_jax.core.extras import require

require("train", __name__)
