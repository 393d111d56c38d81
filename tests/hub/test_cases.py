"""Checkpoints that transformers made, with what it makes of them: read, run, and refused alike.

They are larger than those of this folder and not part of it, so that they are skipped where they
are not found.
"""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from mqa_jax.decode.beam import TRANSFORMERS, beam_search
from mqa_jax.decode.generate import Generator
from mqa_jax.decode.rules import Forbid, ForceLast, Normalize
from mqa_jax.decode.search import greedy
from mqa_jax.hub import load, read_config, save
from mqa_jax.hub.load import weights_by_path


# Where they are: named, or beside the checkout.
def _cases() -> Path | None:
    if named := os.environ.get("MQA_JAX_HUB_CASES"):
        return Path(named)
    root = Path(__file__).parents[2]
    places = [root / up / "shared/hub/cases" for up in ("..", "../..")]
    return next((place for place in places if place.is_dir()), None)


CASES = _cases()
CASE_NAMES = sorted(p.parent.name for p in CASES.glob("*/expected.npz")) if CASES else []
NEGATIVE = sorted(p.parent.name for p in CASES.glob("negative/*/why.txt")) if CASES else []
pytestmark = pytest.mark.skipif(
    CASES is None, reason="no ../shared/hub/cases: name their folder in MQA_JAX_HUB_CASES"
)

# Float32 of two libraries; wrong readings of a config move a logit by a thousandth at least.
TOLERANCE = 1e-4


def expected_of(name):
    return np.load(CASES / name / "expected.npz")


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, state, *ids, **segments):
    return nnx.merge(graphdef, state)(*ids, **segments)


@pytest.mark.parametrize("name", CASE_NAMES)
def test_logits_are_those_of_transformers(name):
    expected = {key: x for key, x in expected_of(name).items()}
    ids, mask = (expected[key].astype(np.int32) for key in ("input_ids", "attention_mask"))
    arguments, segments = (ids,), dict(segment_ids=mask)
    if "decoder_input_ids" in expected:
        arguments = (ids, expected["decoder_input_ids"].astype(np.int32))
        sources, mask = mask, expected["decoder_attention_mask"].astype(np.int32)
        segments = dict(source_segment_ids=sources, target_segment_ids=mask)
    # Of one program for all that have one config, as variants of a case have.
    with jax.default_matmul_precision("highest"):
        found = run(*nnx.split(load(CASES / name).model), *arguments, **segments)
    is_token = mask.astype(bool)
    np.testing.assert_allclose(
        np.asarray(found)[is_token], expected["logits"][is_token], rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("name", CASE_NAMES)
def test_both_generations_of_a_config_say_the_same(name, tmp_path):
    """So that the logits are the same, too."""
    shutil.copy(CASES / name / "config_v4.json", tmp_path / "config.json")
    old, new = read_config(tmp_path), read_config(CASES / name)
    assert old == new


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", CASE_NAMES)
def test_beams_are_those_of_transformers(name):
    """All of its hypotheses, in every setting that there is."""
    pretrained, expected = load(CASES / name), expected_of(name)
    settings = json.loads((CASES / name / "meta.json").read_text())
    lengths = expected["attention_mask"].sum(1)
    prompts = [ids[:n].tolist() for ids, n in zip(expected["input_ids"], lengths, strict=True)]
    for setting in sorted(key for key in settings if key.startswith("beam_")):
        asked = settings[setting]
        rules = [Forbid(words)] if (words := asked.get("bad_words_ids")) else []
        if (end := asked.get("forced_eos_token_id")) is not None:
            rules.append(ForceLast(end))
        if asked.get("renormalize_logits"):
            rules.append(Normalize())
        search = functools.partial(
            beam_search,
            beam_size=4,
            alpha=asked["length_penalty"],
            eos_id=asked.get("eos_token_id"),
            rules=rules,
            beam_rules=dataclasses.replace(TRANSFORMERS, early_stopping=asked["early_stopping"]),
        )
        generator = Generator(
            pretrained.model,
            search=search,
            batch_size=len(prompts),
            bos_id=pretrained.generation.decoder_start_id or 0,
            max_new_tokens=asked["max_new_tokens"],
        )
        with jax.default_matmul_precision("highest"):
            found = dict(generator(nnx.state(pretrained.model), prompts))
        for i in range(len(prompts)):
            wanted, length = expected[f"{setting}_tokens"][i], expected[f"{setting}_lengths"][i]
            np.testing.assert_array_equal(found[i].length, length, err_msg=setting)
            for hypothesis in range(4):
                own = found[i].tokens[hypothesis, : length[hypothesis]]
                theirs = wanted[hypothesis, : length[hypothesis]]
                np.testing.assert_array_equal(own, theirs, err_msg=setting)
            np.testing.assert_allclose(
                found[i].score, expected[f"{setting}_scores"][i], rtol=1e-4, atol=1e-4
            )


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
    "index_leaves_folder": r"names the file .*_good.*\.safetensors file beside it",
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
    assert set(NEGATIVE) <= REASONS.keys()


@pytest.mark.parametrize("name", NEGATIVE)
def test_what_is_wrong_is_refused_with_its_reason(name):
    with pytest.raises(ValueError, match=REASONS[name]):
        load(CASES / "negative" / name)


@pytest.mark.parametrize("name", ["_good", "_good_sharded"])
def test_what_they_were_made_of_loads(name):
    load(CASES / "negative" / name)
