"""Models in eight bits as directories: written and read again, and what is refused of them."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import CONFIGS, write, write_words
from flax import nnx

from mqa_jax import hub
from mqa_jax.convert import quantize
from mqa_jax.core.sharding import ShardingRules, make_mesh


def quantized(directory, name, scheme, **options):
    wide = write(directory, name)
    pretrained = hub.load(wide if name == "marian" else write_words(wide))
    return dataclasses.replace(pretrained, model=quantize(pretrained.model, scheme, **options))


def states(*pretrained):
    return [nnx.as_pure(nnx.state(one.model)) for one in pretrained]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_comes_back_bit_for_bit(name, tmp_path):
    schemes = ("int8", "int8_weights", "fp8")
    scheme = schemes[[*CONFIGS].index(name) % 3]
    given = quantized(tmp_path / "wide", name, scheme, cache_dtype="int8")
    for place, shard_bytes in ((tmp_path / "one", 10**9), (tmp_path / "many", 3000)):
        hub.save(place, given, shard_bytes=shard_bytes)
        found = hub.load(place)
        assert found.model.config == given.model.config
        jax.tree.map(np.testing.assert_array_equal, *states(found, given))
        assert (found.tokenizer is None) == (given.tokenizer is None)
        assert (found.family, found.generation) == (given.family, given.generation)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1


def test_weights_go_where_the_rules_say_and_stay_in_eight_bits(tmp_path):
    given = quantized(tmp_path / "wide", "llama", "int8")
    hub.save(tmp_path / "eight", given)
    mesh = make_mesh(4, 2, 1)
    found = hub.load(tmp_path / "eight", dtype="bfloat16", mesh=mesh)
    assert found.model.config.dtype == "bfloat16"
    wanted = nnx.as_pure(ShardingRules().params(mesh, nnx.state(given.model)))
    own, was = states(found, given)
    for x, sharding, old in zip(*map(jax.tree.leaves, (own, wanted, was)), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
        assert (x.dtype == np.int8) == (old.dtype == np.int8)
        np.testing.assert_array_equal(x, old.astype(x.dtype))
    assert any(x.dtype == np.int8 and not x.is_fully_replicated for x in jax.tree.leaves(own))


def with_config(**changes):
    def spoil(directory):
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] |= changes
        own = config["quantization_config"]
        config["quantization_config"] = {k: v for k, v in own.items() if v != "absent"}
        (directory / "config.json").write_text(json.dumps(config))

    return spoil


def with_tensor(name, change):
    def spoil(directory):
        tensors = safetensors.numpy.load_file(directory / "model.safetensors")
        found = change(tensors.pop(name))
        tensors |= {} if found is None else {name: found}
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")

    return spoil


def filled(number):
    def change(x):
        x = x.copy()
        x.flat[3] = number
        return x

    return change


VALUES = "decoder.layers.1.attention.out.values"
SCALES = "decoder.layers.1.attention.out.scales"
BAD = [
    (with_config(quant_method="gptq"), "the method 'gptq'.*take the one that this was made from"),
    (with_config(quant_method="absent"), "a quantization_config of the method None"),
    (with_config(quantized="int4"), "config.json: quantized .*int4"),
    (with_config(cache_dtype="int4"), "config.json: cache_dtype .*int4"),
    (with_config(cache_dtype="absent"), "quantization_config has the keys .* which are not ours"),
    (with_config(bits=8), "quantization_config has the keys .*bits"),
    (with_config(quantized="fp8"), "values is I8 .* and the scheme is of float8_e4m3fn"),
    (with_tensor(SCALES, filled(0)), "out.scales in .* has a scale of 0.0: they are above 0"),
    (with_tensor(SCALES, filled(-0.5)), "out.scales in .* has a scale of -0.5"),
    (with_tensor(SCALES, filled(np.nan)), "out.scales in .* holds NaN or infinity"),
    (with_tensor(SCALES, filled(np.inf)), "out.scales in .* holds NaN or infinity"),
    (with_tensor(SCALES, lambda x: x[1:]), r"out.scales is F32 .* it must be \["),
    (with_tensor(SCALES, lambda x: None), "lacks the tensor decoder.layers.1.attention.out.scales"),
    (with_tensor(VALUES, lambda x: x.astype(np.float32)), "out.values is F32 .* of int8"),
    (with_tensor(VALUES, lambda x: x[..., 1:].copy()), r"out.values is I8 .* it must be \["),
]


@pytest.mark.parametrize(("spoil", "reason"), BAD)
def test_what_nobody_here_has_written_is_refused_by_name(spoil, reason, tmp_path):
    hub.save(tmp_path / "eight", quantized(tmp_path / "wide", "llama", "int8"))
    spoil(tmp_path / "eight")
    with pytest.raises(ValueError, match=reason):
        hub.load(tmp_path / "eight")


def test_a_tensor_too_many_and_numbers_that_are_none(tmp_path):
    hub.save(tmp_path / "eight", quantized(tmp_path / "wide", "llama", "fp8"))
    path = tmp_path / "eight/model.safetensors"
    whole = path.read_bytes()
    found = hub.load(tmp_path / "eight").model.decoder.layers[0].attention.query.values
    word = np.asarray(found[...]).tobytes()
    assert whole.count(word) == 1
    path.write_bytes(whole.replace(word, b"\x7f" + word[1:]))
    with pytest.raises(ValueError, match="attention.query.values in .* holds NaN"):
        hub.load(tmp_path / "eight")
    shutil.rmtree(tmp_path / "eight")
    hub.save(tmp_path / "eight", quantized(tmp_path / "wide", "llama", "int8"))
    tensors = safetensors.numpy.load_file(path) | {"more": np.ones(3, np.float32)}
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"has more, F32 \[3\] .* no place for it"):
        hub.load(tmp_path / "eight")
