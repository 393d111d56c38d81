import hashlib
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mqa_jax.data import tokenizer as tokenizer_module
from mqa_jax.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer

PROSE = """a multi query transformer decodes fast because all of its heads share keys and values so
that much less memory is read at every step while training costs about as much as before"""
WORDS = PROSE.split()
SENTENCES = [" ".join(WORDS[i % 31 : i % 31 + i % 7 + 1]) for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train(SENTENCES, tmp_path_factory.mktemp("tokenizer") / "model", 307)


@settings(deadline=None)
@given(st.text())
def test_round_trip(tokenizer, text):
    """Any text at all, but for the one character that SentencePiece keeps for itself."""
    ids = tokenizer.encode(text)
    assert ids[-1] == EOS_ID
    assert not {PAD_ID, BOS_ID, EOS_ID, UNK_ID} & set(ids[:-1])
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.parametrize(
    "text",
    ["", " ", "  two  spaces  ", "😀 emoji 👩‍👩‍👧", "Привет", "ﬁ １ e\u0301", "\n\t\r\0\x85\u2028",
     "<s> </s> <unk> <pad> <0x41>"],
)  # fmt: skip
def test_nothing_is_normalized(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_known_words_are_short(tokenizer):
    """A tokenizer of bytes alone would pass all the others."""
    text = "multi query heads share keys"
    assert len(tokenizer.encode(text)) < len(text) * 2 / 3


def test_vocabulary_is_exact(tokenizer):
    assert tokenizer.vocab_size == 307


def test_same_sentences_same_bytes(tokenizer, tmp_path):
    again = Tokenizer.train(iter(SENTENCES), tmp_path / "again", 307)
    assert again.sha256 == tokenizer.sha256
    assert again.sha256 == hashlib.sha256((tmp_path / "again").read_bytes()).hexdigest()
    assert Tokenizer.train(SENTENCES, tmp_path / "other", 306).sha256 != tokenizer.sha256


def test_load(tokenizer, tmp_path):
    Tokenizer.train(SENTENCES, tmp_path / "model", 307)
    loaded = Tokenizer.load(tmp_path / "model")
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode("the heads") == tokenizer.encode("the heads")


def test_load_refuses_other_files(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "garbage").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="garbage: 7 bytes that are no SentencePiece model"):
        Tokenizer.load(tmp_path / "garbage")


def test_load_refuses_other_ids(tmp_path, monkeypatch):
    """As of a model that was trained elsewhere, with SentencePiece's own defaults."""
    monkeypatch.setattr(tokenizer_module, "EOS_ID", UNK_ID)
    monkeypatch.setattr(tokenizer_module, "UNK_ID", EOS_ID)
    Tokenizer.train(SENTENCES, tmp_path / "model", 307)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"model: .*\(0, 1, 3, 2\), not \(0, 1, 2, 3\)"):
        Tokenizer.load(tmp_path / "model")


def test_decode_stops_at_eos_and_skips_the_rest(tokenizer):
    ids = tokenizer.encode("the heads")
    assert tokenizer.decode([BOS_ID, *ids, PAD_ID, *ids, 10**6]) == "the heads"
    assert tokenizer.decode(np.array([PAD_ID, *ids[:-1], PAD_ID], np.int32)) == "the heads"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("bad", [-1, 307])
def test_decode_refuses_unknown_ids(tokenizer, bad):
    with pytest.raises(ValueError, match=f"id {bad} is not in the vocabulary, 0 to 306"):
        tokenizer.decode([5, bad, EOS_ID])


def test_too_large_a_vocabulary_names_the_largest(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"vocab_size 9999 .*--config\.data\.vocab_size=\d+ .*--config\.model\.vocab_size too",
    ) as error:
        Tokenizer.train(SENTENCES, tmp_path / "model", 9999)
    largest = int(str(error.value).split("vocab_size=")[1].split()[0])
    assert Tokenizer.train(SENTENCES, tmp_path / "model", largest).vocab_size == largest
    with pytest.raises(ValueError, match=f"{largest} at most"):
        Tokenizer.train(SENTENCES, tmp_path / "model", largest + 1)


def test_too_small_a_vocabulary_names_the_smallest(tmp_path):
    with pytest.raises(ValueError, match="vocab_size 261 is less") as error:
        Tokenizer.train(SENTENCES, tmp_path / "model", 261)
    smallest = int(str(error.value).split("--config.data.vocab_size=")[1].split()[0])
    assert Tokenizer.train(SENTENCES, tmp_path / "model", smallest).vocab_size == smallest
    with pytest.raises(ValueError, match=f"take, {smallest}:"):
        Tokenizer.train(SENTENCES, tmp_path / "model", smallest - 1)


@pytest.mark.parametrize("sentences", [[], ["", ""]])
def test_no_text_is_refused(tmp_path, sentences):
    with pytest.raises(ValueError, match="no text"):
        Tokenizer.train(sentences, tmp_path / "model", 307)


def test_long_sentences_are_learned_from(tmp_path):
    """SentencePiece leaves out sentences of more than 4192 bytes, were it not told otherwise."""
    tokenizer = Tokenizer.train([*SENTENCES, "ξψ" + " ξψ" * 2000], tmp_path / "model", 307)
    assert len(tokenizer.encode("ξψ")) == 2


def test_a_sample_is_drawn_from_all_and_announced(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tokenizer_module, "MAX_TRAINING_SENTENCES", 50)
    with caplog.at_level(logging.WARNING):
        sample = tokenizer_module._sample((str(i) for i in range(1000)), 50)
    assert "50 of 1000" in caplog.text
    assert len(set(sample)) == 50
    assert sample == tokenizer_module._sample((str(i) for i in range(1000)), 50)
    # Evenly: the mean of 50 even draws is within 4 deviations of the middle.
    assert abs(np.mean([int(i) for i in sample]) - 500) < 4 * 289 / 50**0.5
    assert tokenizer_module._sample(map(str, range(50)), 50) == [str(i) for i in range(50)]


def test_no_piece_is_longer_than_said(tmp_path):
    """What has more characters than its tokens can hold is sorted out unseen."""
    word = "donaudampfschifffahrtsgesellschaft"
    tokenizer = Tokenizer.train([*SENTENCES, *[word] * 99], tmp_path / "model", 310)
    pieces = [tokenizer._model.id_to_piece(i) for i in range(4 + 256, tokenizer.vocab_size)]
    assert 4 < max(map(len, pieces)) <= tokenizer_module.MAX_PIECE_CHARACTERS


@pytest.mark.parametrize("sentences", [["a"], ["y", "nzv"], ["ab", "", "ba"] * 7])
def test_short_sentences_alone_are_enough(tmp_path, sentences):
    """SentencePiece takes no limit below ten bytes."""
    with pytest.raises(ValueError, match="at most") as error:
        Tokenizer.train(sentences, tmp_path / "model", 9999)
    largest = int(str(error.value).split("vocab_size=")[1].split()[0])
    tokenizer = Tokenizer.train(sentences, tmp_path / "model", largest)
    assert [tokenizer.decode(tokenizer.encode(text)) for text in sentences] == sentences
