from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mqa_jax.core import devices


@pytest.mark.parametrize(
    ("kind", "flags", "is_told"),
    [
        ("NVIDIA H100 80GB HBM3", "", True),
        ("NVIDIA H100 80GB HBM3", "--xla_gpu_enable_command_buffer=FUSION", False),
        ("AMD Instinct MI300X", "", False),
        ("cpu", "", False),
    ],
)
def test_a_loop_is_one_cuda_graph_where_there_are_such(kind, flags, is_told, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    monkeypatch.setenv("XLA_FLAGS", flags)
    options = devices.loop_options()
    # XLA, which refuses others on a CPU too, knows each of the words.
    assert bool(options) == is_told
    loop = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 2, x))
    assert loop.lower(jnp.zeros((), int)).compile(options)(jnp.zeros((), int)) == 10


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "AMD Instinct MI300X", "cpu"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "bfloat16"])
def test_products_of_float8_and_of_many_rows_are_not_left_to_xla_on_nvidia(
    kind, dtype, monkeypatch
):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    params = {"norm": jnp.ones(2), "weight": jnp.ones((2, 2), dtype)}
    name = "xla_gpu_enable_triton_gemm"
    for rows in (1, 63, 64):
        is_told = kind.startswith("NVIDIA") and (dtype == "float8_e4m3fn" or rows == 64)
        for options in (devices.product_options(params, rows), devices.loop_options(params, rows)):
            assert options.get(name, True) != is_told
    assert name not in devices.loop_options()


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "is_known"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", "9.0", True),
        ("gpu", "NVIDIA L4", "8.9", True),
        ("gpu", "NVIDIA B200", "10.0", True),
        ("gpu", "NVIDIA A100-SXM4-80GB", "8.0", False),
        ("tpu", "TPU7x", None, True),
        ("tpu", "TPU v6 lite", None, False),
        ("cpu", "cpu", None, False),
    ],
)
def test_devices_that_multiply_float8(platform, kind, capability, is_known):
    device = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    assert devices.multiplies_fp8(device) == is_known


def test_a_name_that_xla_does_not_know_is_left_out_and_told():
    with pytest.warns(UserWarning, match="slower to compile: .*'FISSION' is not a valid enum"):
        assert devices._known(devices._CUDA_GRAPHS, "FUSION,FISSION") == {}
