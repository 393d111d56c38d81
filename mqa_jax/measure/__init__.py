"""What decoding and training cost: the `benchmark` with its `cost` record, `timing`, `roofline`,
`report` and `plots`; and what the TPU compiler says (`compile_only`, `hlo`)."""

from mqa_jax.core.extras import require

require("plot", __name__)
