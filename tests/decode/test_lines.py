"""Lines of text to lines of text: order, blanks, lines without room, and what joins to what.

The decoding itself, which `test_generate.py` has, is a stand-in here: a translation is its source,
a continuation always the same.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mqa_jax import (
    Decoded,
    DecoderOnly,
    EncoderDecoder,
    TransformerConfig,
    beam_search,
    greedy,
    sample,
)
from mqa_jax.data.tokenizer import Tokenizer
from mqa_jax.decode import lines as module
from mqa_jax.decode.lines import LineDecoder
from mqa_jax.decode.rules import Forbid

BOS, EOS, FIRST = 1, 2, 3
MAX_LENGTH = 17
CONFIG = TransformerConfig(
    vocab_size=300,
    d_model=4,
    d_ff=5,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    max_length=MAX_LENGTH,
)
CONTINUATION = " und\u2028so\r\nweiter"


class Bytes:
    """A tokenizer of bytes that, as SentencePiece, puts a space in front, and takes it away."""

    begin_ids, end_ids = (), (EOS,)

    def encode(self, text):
        return [*(FIRST + byte for byte in b" " + text.encode()), EOS]

    def encode_target(self, text):
        return self.encode(text.swapcase())  # Another language.

    def decode(self, ids):
        ids = [i for i in ids if i != BOS]
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        return bytes(i - FIRST for i in ids).decode(errors="replace").removeprefix(" ")


@functools.cache
def make_model(model_type, max_length):
    config = dataclasses.replace(CONFIG, max_length=max_length)
    return nnx.eval_shape(lambda: model_type(config, rngs=nnx.Rngs(0)))


class Copier(LineDecoder):
    """Decodes without a model; what it was called with is in `calls`."""

    def __init__(self, model_type, **options):
        model = make_model(model_type, options.pop("max_length", MAX_LENGTH))
        options = dict(search=greedy, batch_size=2, bos_id=BOS) | options
        super().__init__(model, Bytes(), **options)
        self.calls, self.continuation = [], Bytes().encode(CONTINUATION)[1:]

    def _decode(self, params, batch):
        prompts = zip(batch.given["prompt_BP"], batch.given["lengths_B"], strict=True)
        rows = [row[:length].tolist() for row, length in prompts]
        self.calls.append((rows, batch.keys))
        outputs = rows
        if not self._batcher.is_translation:
            outputs = [self.continuation for _ in rows]
        tokens = np.zeros((len(rows), max(map(len, outputs))), np.int32)
        for row, output in zip(tokens, outputs, strict=True):
            row[: len(output)] = output
        self.stats.steps += tokens.shape[1]
        return Decoded(
            tokens=tokens, length=np.array([*map(len, outputs)]), steps=np.int32(tokens.shape[1])
        )


translate = functools.partial(Copier, EncoderDecoder)
LINES = ["fünf", "", "six six six six", "a", " \t", "eins zwei", "b\x00c", ""]


def test_outputs_are_in_order_and_blank_lines_stay_blank():
    decoder = translate()
    assert list(decoder.texts(None, LINES)) == [line if line.strip() else "" for line in LINES]
    assert decoder.stats.blank == {2, 5, 8} and not decoder.stats.too_long
    assert sum(len({*map(tuple, rows)}) for rows, _ in decoder.calls) == 5


def test_outputs_come_before_all_is_decoded(monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 1)
    decoder = translate()
    # The longest comes first, though shorter ones are decoded before those beside them.
    outputs = decoder.texts(None, ["ccc", "b", "a"] * 5)
    assert [next(outputs) for _ in range(3)] == ["ccc", "b", "a"]
    assert len(decoder.calls) == 2
    assert list(outputs) == ["ccc", "b", "a"] * 4


@pytest.mark.parametrize("lines", [[], [""], ["", "  "]])
def test_nothing_to_decode(lines):
    decoder = translate()
    assert list(decoder.texts(None, lines)) == [""] * len(lines) and decoder.calls == []


LONG = "One two. Three four?  Five six seven eight nine"


@pytest.mark.parametrize(
    ("on_long", "output"),
    [
        ("skip", ""),
        ("cut", LONG[:15]),
        ("split", "One two. Three four? Five six seven eight nine"),
    ],
)
def test_a_line_without_room_is_counted_and_done_as_asked(on_long, output):
    decoder = translate()
    assert list(decoder.texts(None, ["a", LONG, "b"], on_long=on_long)) == ["a", output, "b"]
    assert decoder.stats.too_long == {2}
    if on_long == "split":
        parts = {Bytes().decode(row) for rows, _ in decoder.calls for row in rows}
        assert {"One two.", "Three four?"} <= parts, "between sentences first"


def test_a_line_is_split_between_sentences_though_words_are_nearer_to_its_middle():
    decoder, line = translate(), "One two. Three four five"
    assert list(decoder.texts(None, [line], on_long="split")) == [line]
    parts = {Bytes().decode(row) for rows, _ in decoder.calls for row in rows}
    assert parts == {"One two.", "Three four five"}


def test_a_line_without_room_is_refused_before_any_is_decoded():
    decoder = translate()
    message = rf"line 2 has {len(LONG) + 2} tokens, .* room for 17 .*on_long=skip, cut or split"
    with pytest.raises(ValueError, match=message):
        decoder.texts(None, ["a", LONG])
    assert decoder.calls == []
    with pytest.raises(ValueError, match="'trim' is not one of error, skip, cut, split"):
        decoder.texts(None, ["a"], on_long="trim")


@settings(max_examples=200, deadline=None)
@given(st.text("ab.?ü。 \u3000", max_size=60), st.integers(5, 9))
def test_parts_of_a_line_have_room_and_lose_nothing(line, room):
    decoder = translate(max_length=room)
    (output,) = decoder.texts(None, [line], on_long="split")
    assert output.split() == line.split()
    assert all(len(row) <= room for rows, _ in decoder.calls for row in rows)


def test_a_character_without_room_is_named():
    with pytest.raises(ValueError, match="line 1 holds '語', which takes 5 tokens, .* room for 4"):
        translate(max_length=4).texts(None, ["a 語"], on_long="split")


def test_a_continuation_follows_its_line():
    decoder = Copier(DecoderOnly, max_new_tokens=5)
    lines = ["one two", "", "x"]
    outputs = list(decoder.texts(None, lines))
    assert outputs == [" und so weiter", "", " und so weiter"]
    # What a language model sees is the end, as what follows hangs on that.
    assert list(decoder.texts(None, [LONG], on_long="cut")) == [" und so weiter"]
    [row, _] = decoder.calls[-1][0]
    assert row == [BOS, *Bytes().encode(LONG)[:-1][-11:]] and len(row) == MAX_LENGTH - 5
    with pytest.raises(ValueError, match="on_long=split is for translations"):
        decoder.texts(None, lines, on_long="split")


def test_a_continuation_keeps_its_space_with_a_tokenizer_of_sentencepiece(tmp_path):
    whole = ["one two three", "six four two", "two six one"] * 9
    tokenizer = Tokenizer.train(whole, tmp_path / "model", vocab_size=275)
    decoder = Copier(DecoderOnly, max_new_tokens=5)
    decoder._tokenizer = tokenizer
    for ids in (tokenizer.encode(" three"), tokenizer.encode("three")):
        # The second has the mark of a space, too, which SentencePiece puts in front of a text.
        decoder.continuation = ids
        (output,) = decoder.texts(None, ["one two"])
        assert "one two" + output == tokenizer.decode([*tokenizer.encode("one two")[:-1], *ids])
        assert output.strip() == "three" and output.startswith(" ")


def test_outputs_that_reached_the_limit_are_counted():
    class Endless(Copier):
        def _decode(self, *args):
            decoded = super()._decode(*args)
            return dataclasses.replace(decoded, length=np.minimum(decoded.length, 4))

    decoder = Endless(EncoderDecoder)
    assert list(decoder.texts(None, ["ab", "abcdef"])) == ["ab", "abc"]
    assert decoder.stats.unended == {2}


@pytest.mark.parametrize("make_keys", [jax.random.key, jax.random.PRNGKey])
def test_what_a_line_draws_is_its_own_and_so_is_what_a_part_draws(make_keys):
    keys = jax.random.split(make_keys(3), 4)
    decoder = translate(batch_size=1, search=sample)
    lines = ["a", LONG, "", "b"]
    list(decoder.texts(None, lines, keys, on_long="split"))

    def data(key):
        return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())

    drawn = {Bytes().decode(rows[0]): data(used) for rows, used in decoder.calls}
    assert drawn["a"] == data(keys[0]) and drawn["b"] == data(keys[3])
    assert drawn["One two."] == data(keys[1])
    assert len({*drawn.values()}) == len(drawn) > 4


def test_n_best_outputs_of_lines():
    """As many as there are, best first; the first is the output."""
    model = make_model(EncoderDecoder, MAX_LENGTH)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: rng.normal(scale=0.5, size=x.shape).astype(np.float32), nnx.state(model)
    )
    # Those that are no bytes.
    rules = [Forbid([0, *range(FIRST + 256, 300)])]
    search = functools.partial(beam_search, beam_size=3, eos_id=EOS, rules=rules)
    options = dict(search=search, batch_size=2, bos_id=BOS, max_new_tokens=4)
    decoder = LineDecoder(model, Bytes(), **options)
    lines = ["fünf", "", "six", "a"]
    answers = list(decoder.n_best(params, lines))
    assert [len(outputs) for outputs in answers] == [3, 0, 3, 3]
    best = list(decoder.texts(params, lines))
    assert [outputs[0][0] if outputs else "" for outputs in answers] == best
    for outputs in filter(None, answers):
        scores = [score for _, score in outputs]
        assert scores == sorted(scores, reverse=True) and len({*scores}) == 3
    for on_long in ("split", "trim"):
        with pytest.raises(ValueError, match=f"on_long '{on_long}' is not one of error, skip, cut"):
            decoder.n_best(params, lines, on_long=on_long)


@pytest.mark.parametrize("model_type", [EncoderDecoder, DecoderOnly])
def test_scores_of_lines(model_type):
    """A text is scored with its end, behind a line as it would follow it."""
    model, seen = make_model(model_type, MAX_LENGTH), []

    class Recorder(LineDecoder):
        def _scores(self, params, batches, name):
            seen.extend(batches)
            return iter(())

    decoder = Recorder(model, Bytes(), search=greedy, batch_size=1, bos_id=BOS, max_new_tokens=4)
    assert list(decoder.score(None, ["ab"], [" c"])) == []
    [batch] = seen
    prompt, answer = (
        batch.given[ids][0, : batch.given[lengths][0]].tolist()
        for ids, lengths in (("prompt_BP", "lengths_B"), ("answer_BT", "answer_lengths_B"))
    )
    encode = Bytes().encode
    if model_type is EncoderDecoder:
        assert (prompt, answer) == (encode("ab"), encode(" C"))
    else:
        # The tokenizer's own space is that of the text.
        assert (prompt, answer) == ([BOS, *encode("ab")[:-1]], encode("c"))
    with pytest.raises(ValueError, match="answers must be one a prompt, 2, not 1"):
        decoder.score(None, ["a", "b"], ["c"])


def test_an_answer_that_merges_with_its_line_begins_with_nothing():
    """A tokenizer may put an id in front of each text, which an answer is not."""
    seen = []

    class Merging(Bytes):
        begin_ids = (BOS,)

        def encode(self, text):
            return [BOS, *(FIRST + byte for byte in text.replace("bc", "x").encode()), EOS]

        encode_target = encode

    class Recorder(LineDecoder):
        def _scores(self, params, batches, name):
            seen.extend(batches)
            return iter(())

    options = dict(search=greedy, batch_size=1, bos_id=BOS, max_new_tokens=4, has_bos=False)
    decoder = Recorder(make_model(DecoderOnly, MAX_LENGTH), Merging(), **options)
    assert list(decoder.score(None, ["ab"], ["cd"])) == []
    [batch] = seen
    assert batch.given["prompt_BP"][0, : batch.given["lengths_B"][0]].tolist()[0] == BOS
    assert batch.given["answer_BT"][0, :3].tolist() == [FIRST + ord("c"), FIRST + ord("d"), EOS]
    assert batch.given["answer_lengths_B"].tolist() == [3]
