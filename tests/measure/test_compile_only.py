"""The reports on compilations for a TPU: on this CPU's devices, and real ones with libtpu."""

import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import lm1b, wmt14
from mqa_jax.core.extras import MissingExtra
from mqa_jax.core.sharding import make_mesh
from mqa_jax.measure import compile_only
from mqa_jax.measure.compile_only import CHIPS, Topology
from mqa_jax.train.setup import set_up


def test_bytes_on_a_device_follow_the_sharding():
    mesh = make_mesh(2, 2, 2)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    split = jax.ShapeDtypeStruct((8, 3, 10), jnp.bfloat16, sharding=sharding)
    whole = jax.ShapeDtypeStruct((7,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    assert compile_only.device_bytes({"a": split, "b": [whole]}) == 2 * 2 * 3 * 5 + 4 * 7


def test_a_device_has_its_share_of_a_chip():
    topology = Topology("v3:2x2", [None] * 8, CHIPS["v3"], chips=4)
    assert topology.device.memory == 16 * 2**30
    assert (topology.device.tflop_per_s, topology.device.gb_per_s) == (61.5, 450)


OUT_OF_MEMORY = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (20.50G) exceeds available HBM (7.48G). HLO module: jit_step."
)


def test_the_compilers_complaint_is_read():
    assert compile_only.out_of_memory(OUT_OF_MEMORY) == (20.5 * 2**30, 7.48 * 2**30)
    small = OUT_OF_MEMORY.replace("20.50G", "900.5M").replace("7.48G", "123")
    assert compile_only.out_of_memory(small) == (900.5 * 2**20, 123)
    assert compile_only.out_of_memory("INTERNAL: something else") is None


def fails(message: str):
    def compile():
        raise jax.errors.JaxRuntimeError(message)

    return types.SimpleNamespace(compile=compile)


def test_what_does_not_fit_says_by_how_much_and_what_would_help(capsys):
    mesh = make_mesh()
    topology = Topology("v2:2x2", jax.devices(), CHIPS["v2"], chips=4)
    x = jax.ShapeDtypeStruct((2**20,), jnp.int8, sharding=NamedSharding(mesh, PartitionSpec()))
    report = lambda lowered: compile_only.report("it", topology, mesh, lowered, {"x": x}, "less")  # noqa: E731
    assert report(fails(OUT_OF_MEMORY)) is False
    printed = capsys.readouterr().out
    assert (
        "20.500 GiB" in printed and "of 8.000 GiB" in printed and "13.020 GiB too much" in printed
    )
    assert "what would help: less" in printed and "1.000 MiB" in printed
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        report(fails("INTERNAL: something else"))


def test_without_libtpu_the_way_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "mqa_jax\[all,tpu\]"'):
        compile_only.find_topology("v5e:2x2")


def test_an_unknown_chip_is_refused_with_the_list(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    with pytest.raises(ValueError, match=r"'v9:2x2' is not known .*v2, v3.* v5e:16x16"):
        compile_only.find_topology("v9:2x2")


def tiny_config(variant="multi_query", configs=wmt14, **mesh):
    config = configs.get_config(variant)
    config.model.update(d_model=32, d_ff=48, num_layers=1, head_dim=8, max_length=16)
    config.model.vocab_size = config.data.vocab_size = 64
    config.train.batch_size = 16
    config.mesh.update(mesh)
    return config


@pytest.fixture
def cpu_topology(monkeypatch):
    """The devices of this process in the place of TPUs."""
    topology = Topology("v5e:2x4", jax.devices(), CHIPS["v5e"], chips=8)
    monkeypatch.setattr(compile_only, "find_topology", lambda name: topology)


def test_the_step_that_is_compiled_is_the_one_that_trains():
    config, mesh = tiny_config(fsdp=2, tensor=2), make_mesh(2, 2, 2)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    tokens = jax.device_put(np.zeros((16, 16), np.int32), sharding)
    batch = dict(source_tokens=tokens, target_tokens=tokens)
    _, state, step, _ = set_up(config, mesh)
    _, abstract, abstract_step, _ = set_up(config, mesh, is_abstract=True)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
    assert abstract_step.lower(abstract, batch).as_text() == step.lower(state, batch).as_text()


def test_a_train_step_is_told_of(cpu_topology, capsys):
    assert compile_only.train(tiny_config(configs=lm1b, fsdp=2), "v5e:2x4") == 0
    printed = capsys.readouterr().out
    assert "8 devices, mesh data=4 fsdp=2 tensor=1" in printed
    for word in ("parameters", "optimizer", "batch", "activations", "16.000 GiB", "197 TFLOP/s"):
        assert word in printed
    assert "all-reduce" in printed


def test_every_decode_step_is_told_of(cpu_topology, capsys):
    configs = {name: tiny_config(name, tensor=2) for name in ("multi_head", "multi_query_local")}
    sizes = dict(batch_sizes=[8, 16], context_lengths=[16], dtypes=["float32"])
    assert compile_only.decode(configs, "v5e:2x4", **sizes) == 0
    printed = capsys.readouterr().out
    assert printed.count("memory of a device") == 4
    assert "multi_query_local, a decode step in float32, batch 16, context 16" in printed
    with pytest.raises(ValueError, match="axis B of BKSH.*has size 6, which the 4 parts"):
        compile_only.decode(configs, "v5e:2x4", batch_sizes=[6], context_lengths=[16])


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu, the TPU compiler, is not installed: pip install --editable ".[all,tpu]"',
)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "devices", "memory"),
    [
        ("v2:2x2", 8, 8),
        ("v3:4x4", 32, 16),
        ("v4:2x2x1", 4, 32),
        ("v5e:2x2", 4, 16),
        ("v6e:16x16", 256, 32),
        ("tpu7x:2x2x1", 8, 96),
    ],
)
def test_topologies(name, devices, memory):
    topology = compile_only.find_topology(name)
    assert make_mesh(devices=topology.devices).size == devices
    assert make_mesh(-1, 2, 2, devices=topology.devices).size == devices
    assert topology.device.memory == memory * 2**30


@needs_libtpu
def test_a_topology_that_libtpu_does_not_know_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"'v5e:7x7' is not known .*not divisible.* v5e:16x16"):
        compile_only.find_topology("v5e:7x7")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v2:2x2", "v5e:2x2"])
def test_real_compilations(name, capsys):
    assert compile_only.train(tiny_config(fsdp=2), name) == 0
    configs = {"multi_query": tiny_config()}
    sizes = dict(batch_sizes=[16], context_lengths=[16])
    assert compile_only.decode(configs, name, **sizes) == 0
    trained, decoded = capsys.readouterr().out.split("multi_query, a decode step")
    assert "reduce-scatter" in trained
    assert "by the compiler's cost model" in decoded and "collectives: none" in decoded

    configs["multi_query"].model.vocab_size = 2**29
    assert compile_only.decode(configs, name, **sizes) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
