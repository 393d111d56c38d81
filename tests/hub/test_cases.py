"""Checkpoints that transformers made, with what it makes of them: read, run, and refused alike.

They are larger than those of this folder and not part of it, so that they are skipped where they
are not found.
"""

import shutil

import jax
import numpy as np
import pytest
from checkpoints import CASE_NAMES, CASES, NEGATIVE, needs_cases
from flax import nnx

from mqa_jax.decode.generate import Generator
from mqa_jax.decode.search import greedy
from mqa_jax.hub import load, read_config, save
from mqa_jax.hub.load import weights_by_path

pytestmark = needs_cases

# Float32 of two libraries; wrong readings of a config move a logit by a thousandth at least.
TOLERANCE = 1e-4


def expected_of(name):
    return np.load(CASES / name / "expected.npz")


def logits(pretrained, expected):
    """Logits and which of them count."""
    mask = expected["attention_mask"].astype(np.int32)
    ids = expected["input_ids"].astype(np.int32)
    with jax.default_matmul_precision("highest"):
        if "decoder_input_ids" not in expected:
            return pretrained.model(ids, segment_ids=mask), mask.astype(bool)
        targets = expected["decoder_input_ids"].astype(np.int32)
        target_mask = expected["decoder_attention_mask"].astype(np.int32)
        found = pretrained.model(
            ids, targets, source_segment_ids=mask, target_segment_ids=target_mask
        )
        return found, target_mask.astype(bool)


def check_logits(pretrained, name):
    expected = expected_of(name)
    found, counts = logits(pretrained, expected)
    np.testing.assert_allclose(
        np.asarray(found)[counts], expected["logits"][counts], rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("name", CASE_NAMES)
def test_logits_are_those_of_transformers(name):
    check_logits(load(CASES / name), name)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_both_generations_of_a_config_say_the_same(name, tmp_path):
    """So that the logits are the same, too."""
    shutil.copy(CASES / name / "config_v4.json", tmp_path / "config.json")
    old, new = read_config(tmp_path), read_config(CASES / name)
    assert old == new


@pytest.mark.parametrize("name", CASE_NAMES)
def test_greedy_tokens_are_those_of_transformers(name):
    pretrained, expected = load(CASES / name), expected_of(name)
    lengths = expected["attention_mask"].sum(1)
    prompts = [ids[:n].tolist() for ids, n in zip(expected["input_ids"], lengths, strict=True)]
    generator = Generator(
        pretrained.model,
        search=greedy,
        batch_size=len(prompts),
        bos_id=pretrained.generation.decoder_start_id or 0,
        max_new_tokens=expected["greedy"].shape[1],
    )
    with jax.default_matmul_precision("highest"):
        found = generator.tokens(nnx.state(pretrained.model), prompts)
    assert found == expected["greedy"].tolist()


@pytest.mark.parametrize("name", CASE_NAMES)
def test_what_is_saved_is_loaded_bit_for_bit(name, tmp_path):
    pretrained = load(CASES / name)
    save(tmp_path / "saved", pretrained)
    again = load(tmp_path / "saved")
    assert again.model.config == pretrained.model.config
    assert again.generation == pretrained.generation
    own, other = (weights_by_path(nnx.state(p.model)) for p in (pretrained, again))
    assert own.keys() == other.keys()
    for path, weight in own.items():
        assert other[path][...].dtype == weight[...].dtype
        np.testing.assert_array_equal(other[path][...], weight[...], err_msg=path)


# What the refusal of each must say, as a user would look for it.
REASONS = {
    "bad_json": r"config\.json is cut short",
    "empty_file": r"model\.safetensors is damaged.* 0 bytes",
    "extra_layer": r"model\.layers\.3\..* of 3 layers",
    "extra_tensor": r"model\.layers\.1\.self_attn\.q_proj\.bias.*no place",
    "huge_header": rf"its header has {2**60} bytes",
    "index_lacks_tensor": r"layers\.1\.self_attn\.k_proj\.weight is in .* it is nowhere",
    "index_leaves_folder": r"names the file '\.\./.*beside the index",
    "integer_tensor": r"layers\.1\.self_attn\.k_proj\.weight is I8.*quantized",
    "missing_tensor": r"lacks the tensor model\.layers\.1\.self_attn\.k_proj\.weight",
    "no_config": r"has no config\.json",
    "no_weights": r"has no weights",
    "not_finite": r"layers\.1\.self_attn\.k_proj\.weight in .* NaN",
    "pickle_only": r"pytorch_model\.bin alone.*pickle",
    "quantized_config": r"quantization_config",
    "shard_lacks_tensor": r"k_proj\.weight is .*index\.json it is in model-00001",
    "shard_missing": r"model-00002-of-00005\.safetensors, which is missing",
    "transposed": r"layers\.0\.mlp\.down_proj\.weight is F32 \[24, 16\].*must be \[16, 24\]",
    "truncated_data": r"28224 bytes, but 27224 are there",
    "truncated_header": r"model\.safetensors is damaged.* of 200 in all",
    "unknown_activation": r"hidden_act .*'quick_gelu'",
    "unknown_model_type": r"model_type is 'nosuchmodel'",
    "unknown_rope": r"rope_type is 'longrope'",
    "wrong_architecture": r"architectures is \['LlamaForSequenceClassification'\]",
    "wrong_shape": r"k_proj\.weight is F32 \[4, 16\].*must be \[8, 16\]",
}


def test_every_refusal_has_its_reason_here():
    assert REASONS.keys() == set(NEGATIVE)


@pytest.mark.parametrize("name", NEGATIVE)
def test_what_is_wrong_is_refused_with_its_reason(name):
    with pytest.raises(ValueError, match=REASONS[name]):
        load(CASES / "negative" / name)


@pytest.mark.parametrize("name", ["_good", "_good_sharded"])
def test_what_they_were_made_of_loads(name):
    load(CASES / "negative" / name)
