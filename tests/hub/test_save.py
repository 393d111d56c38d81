"""A model as a directory: whole or not at all, and the same when it is read again."""

import json

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import CONFIGS, tensors, write
from flax import nnx
from test_load import check_logits

from mqa_jax import DecoderOnly, TransformerConfig
from mqa_jax.hub import load, save
from mqa_jax.hub.load import weights_by_path


def weights(pretrained):
    state = weights_by_path(nnx.state(pretrained.model))
    return {path: np.asarray(weight[...]) for path, weight in state.items()}


def check_equal(a, b):
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_is_the_checkpoint_that_was_loaded(tmp_path, name):
    pretrained = load(write(tmp_path / "given", name))
    save(tmp_path / "saved", pretrained)
    again = load(tmp_path / "saved")
    assert again.model.config == pretrained.model.config
    assert again.generation == pretrained.generation
    check_equal(weights(again), weights(pretrained))
    found = safetensors.numpy.load_file(tmp_path / "saved/model.safetensors")
    found.pop("lm_head.weight", None)
    expected = {key: x for key, x in tensors(name).items() if key != "lm_head.weight"}
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        # Of Gemma 1 is added and taken off again, which rounds twice.
        np.testing.assert_allclose(found[key], tensor, rtol=0, atol=3e-7, err_msg=key)


@pytest.mark.parametrize("name", ["gemma", "gpt2", "mt5"])
def test_weights_in_bfloat16_stay_so(tmp_path, name):
    pretrained = load(write(tmp_path / "given", name), dtype="bfloat16")
    save(tmp_path / "saved", pretrained)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    check_equal(weights(load(tmp_path / "saved", dtype="bfloat16")), weights(pretrained))


def test_large_models_are_written_in_shards(tmp_path):
    pretrained = load(write(tmp_path / "given", "llama"))
    save(tmp_path / "saved", pretrained, shard_bytes=10_000)
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = [(tmp_path / "saved" / file).stat().st_size for file in files]
    assert max(sizes) < 13_000
    check_logits(tmp_path / "saved", "llama")


def test_a_t5_whose_tied_logits_have_no_factor_has_its_softmax_by_itself(tmp_path):
    directory = write(tmp_path / "given", "t5", tie_word_embeddings=False)
    pretrained = load(directory)
    assert pretrained.model.config.tied_softmax and pretrained.model.config.logits_scale == 1
    save(tmp_path / "saved", pretrained)
    found = safetensors.numpy.load_file(tmp_path / "saved/model.safetensors")
    np.testing.assert_array_equal(found["lm_head.weight"], found["shared.weight"])
    assert load(tmp_path / "saved").model.config == pretrained.model.config


def test_a_model_alone_is_saved_as_what_is_said(tmp_path):
    pretrained = load(write(tmp_path / "given", "qwen2"))
    with pytest.raises(ValueError, match="give family="):
        save(tmp_path / "saved", pretrained.model)
    save(tmp_path / "saved", pretrained.model, family="qwen2")
    check_logits(tmp_path / "saved", "qwen2")
    # Where there are no ids, transformers has its own.
    assert "eos_token_id" not in json.loads((tmp_path / "saved/config.json").read_text())
    with pytest.raises(ValueError, match="'bert' is not a supported model type: gpt2, "):
        save(tmp_path / "other", pretrained.model, family="bert")
    with pytest.raises(ValueError, match="a t5 is of the class EncoderDecoder, not DecoderOnly"):
        save(tmp_path / "other", pretrained.model, family="t5")
    with pytest.raises(ValueError, match="llama cannot say bias="):
        save(tmp_path / "other", pretrained.model, family="llama")
    assert not (tmp_path / "other").exists()


def test_a_marian_with_a_softmax_of_its_own_shares_the_other_tables(tmp_path):
    directory = write(tmp_path / "given", "marian")
    found = safetensors.numpy.load_file(directory / "model.safetensors")
    table = next(array for name, array in found.items() if name.endswith("shared.weight"))
    found["lm_head.weight"] = table[::-1].copy()
    safetensors.numpy.save_file(found, directory / "model.safetensors")
    save(tmp_path / "saved", load(directory))
    # False would be about the tables of encoder and decoder as well, which are not written.
    assert json.loads((tmp_path / "saved/config.json").read_text())["tie_word_embeddings"] is True
    check_equal(*(weights(load(path)) for path in (tmp_path / "saved", directory)))


def test_a_gemma_2_without_windows_has_a_size_of_them(tmp_path):
    directory = write(tmp_path / "given", "gemma2", layer_types=["full_attention"] * 2)
    save(tmp_path / "saved", load(directory))
    assert json.loads((tmp_path / "saved/config.json").read_text())["sliding_window"] == 4096
    assert load(tmp_path / "saved").model.config.windows == (None, None)


def test_a_gemma_2_has_a_whole_number_for_a_scale(tmp_path):
    directory = write(tmp_path / "given", "gemma2", query_pre_attn_scalar=25.5)
    with pytest.raises(ValueError, match="gemma2 cannot say attention_scale="):
        save(tmp_path / "saved", load(directory))


def test_the_papers_model_is_no_familys(tmp_path):
    sizes = dict(vocab_size=7, d_model=6, d_ff=5, num_layers=1, num_heads=2, num_kv_heads=1)
    config = TransformerConfig(**sizes, head_dim=4, max_length=11)
    model = DecoderOnly(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="a checkpoint of llama cannot say positions='learned'"):
        save(tmp_path / "saved", model, family="llama")


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    pretrained = load(write(tmp_path / "given", "llama"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the directory 'gs://bucket/model' is an address"):
        save("gs://bucket/model", pretrained)
    with pytest.raises(ValueError, match="given is there already"):
        save(tmp_path / "given", pretrained)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", pretrained)
    check_logits(tmp_path / "empty", "llama")
    (tmp_path / "linked").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    save(tmp_path / "link", pretrained)
    check_logits(tmp_path / "linked", "llama")
    before = set(tmp_path.iterdir())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="here is the working directory"):
        save(".", pretrained)
    (tmp_path / "here").rmdir()
    broken = load(tmp_path / "given")
    scale = broken.model.decoder.norm.scale
    scale[...] = scale[...].at[2].set(np.inf)
    with pytest.raises(ValueError, match="norm.weight has weights that are NaN or infinite"):
        save(tmp_path / "saved", broken)

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "saved", pretrained)
    assert set(tmp_path.iterdir()) == before
