"""What is published of the devices that JAX runs on."""

# Published peaks of bfloat16 products in units of 1e12 a second, by what JAX calls a device: a core
# of TPU v2, v3 and 7x, else a chip.
PEAK_TFLOP_PER_S = {
    "TPU v2": 23,
    "TPU v3": 61.5,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "TPU7x": 1153.5,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
}
