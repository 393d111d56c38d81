"""Tokens as they come, and strings that end an answer."""

import functools

import jax
import numpy as np
import pytest
from test_generate import BOS, END, MODELS, SEARCHES, make_decoder, make_lines, make_model

from mqa_jax import DecoderOnly, EncoderDecoder, beam_search, greedy
from mqa_jax.decode.generate import Generator
from mqa_jax.decode.rules import NoRepeatNgram, RepetitionPenalty
from mqa_jax.decode.stream import Stop
from mqa_jax.measure.timing import no_compilation

both_models = pytest.mark.parametrize("model_type", MODELS)
PROMPTS = [[BOS, 5, 7, 3], [BOS, 4], [BOS, *range(3, 11), *range(3, 11), 6], [BOS, 8, 8], [BOS, 9]]
NEW = 11


def letters(ids):
    return "".join(chr(ord("a") + id) for id in ids)


def make_generator(model, search, **options):
    options = dict(batch_size=3, bos_id=BOS, max_new_tokens=NEW) | options
    return Generator(model, search=search, **options)


def keys_of(name):
    return jax.random.split(jax.random.key(0), len(PROMPTS)) if name == "sample" else None


@pytest.mark.parametrize(
    ("model_type", "name"),
    [(DecoderOnly, "greedy"), pytest.param(EncoderDecoder, "sample", marks=pytest.mark.slow)],
)
def test_pieces_are_the_answers(model_type, name):
    model, params = make_model(model_type)
    search = functools.partial(SEARCHES[name], rules=[RepetitionPenalty(1.2)])
    keys = keys_of(name)
    plain = make_generator(model, search)
    expected = plain.tokens(params, PROMPTS, keys)
    assert len({len(ids) for ids in expected}) > 1, "some should end early"
    for every in (3, 20):
        generator = make_generator(model, search)
        answers, is_over, sizes = [[] for _ in PROMPTS], set(), set()
        for i, ids, is_last in generator.stream(params, PROMPTS, keys, every=every):
            assert i not in is_over and (ids or is_last) and len(ids) <= every
            answers[i] += ids
            sizes.add(len(ids))
            is_over |= {i} if is_last else set()
        assert answers == expected and is_over == {*range(len(PROMPTS))}
        assert len(sizes) > 1
        assert generator.stats.tokens == sum(map(len, expected))
        assert generator.stats.steps == plain.stats.steps
        assert generator.stats.rows == plain.stats.rows
    with no_compilation():
        list(generator.stream(params, PROMPTS[::-1], keys, every=every))


@both_models
def test_the_first_piece_comes_before_the_last_step(model_type):
    """Pieces of a batch come between each other, and nothing is decoded ahead of need."""
    model, params = make_model(model_type)
    generator = make_generator(model, greedy)
    pieces = generator.stream(params, PROMPTS[:2], every=2)
    first = [next(pieces), next(pieces)]
    assert [piece.prompt for piece in first] == [1, 0] or [p.prompt for p in first] == [0, 1]
    assert generator.stats.steps == 2
    assert [len(piece.ids) for piece in pieces][-2:] == [1, 1]
    assert generator.stats.steps == NEW


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        (EncoderDecoder, "greedy"),
        (DecoderOnly, "sample"),
        (EncoderDecoder, "beam_search"),
    ],
)
def test_an_answer_ends_at_a_string(model_type, name):
    """Where it would go on: with the token that completes it, in whatever part that comes."""
    model, params = make_model(model_type)
    search = functools.partial(SEARCHES[name], token_scores=True)
    keys = keys_of(name)
    plain = dict(make_generator(model, search)(params, PROMPTS, keys))
    whole = [plain[i].tokens.reshape(-1, NEW)[0] for i in range(len(PROMPTS))]
    texts = [letters(ids[: plain[i].length.flat[0]].tolist()) for i, ids in enumerate(whole)]
    # Two letters of an answer, and what no answer has.
    longest = max(texts, key=len)
    strings = [longest[len(longest) // 3 :][:2], "zz"]
    assert any(strings[0] in text for text in texts)
    generator = make_generator(model, search, stop=Stop(strings, letters))
    ended = 0
    for i, decoded in generator(params, PROMPTS, keys):
        end = texts[i].find(strings[0])
        length = len(texts[i]) if end < 0 else end + len(strings[0])
        ended += length < len(texts[i])
        assert decoded.length.flat[0] == length
        best = decoded.tokens[0] if name == "beam_search" else decoded.tokens
        np.testing.assert_array_equal(best[:length], whole[i][:length])
        assert decoded.token_scores.shape == decoded.tokens.shape
    if name == "beam_search":  # Whose answers may be of one token.
        return
    assert ended
    streamed = [[] for _ in PROMPTS]
    for i, ids, _ in generator.stream(params, PROMPTS, keys, every=3):
        streamed[i] += ids
    for text, ids in zip(texts, streamed, strict=True):
        end = text.find(strings[0])
        assert letters(ids) == (text if end < 0 else text[: end + len(strings[0])])


def test_rows_that_have_all_ended_at_strings_are_not_decoded_further():
    model, params = make_model(DecoderOnly)
    search = functools.partial(greedy, eos_id=None)
    texts = make_generator(model, search).tokens(params, PROMPTS[:2])
    first = [letters(ids)[0] for ids in texts]
    generator = make_generator(model, search, stop=Stop(first, letters), max_new_tokens=22)
    pieces = list(generator.stream(params, PROMPTS[:2], every=2))
    assert sorted(pieces) == [(0, texts[0][:1], True), (1, texts[1][:1], True)]
    assert generator.stats.steps == 2


def test_lines_without_the_string_that_ended_them():
    model, params = make_model(DecoderOnly)
    lines = make_lines(3, 5, 2)
    search = functools.partial(greedy, eos_id=END)
    plain = list(make_decoder(model, search, max_new_tokens=9).texts(params, lines))
    string = " ".join(max(plain, key=len).split()[2:4])
    decoder = make_decoder(model, search, max_new_tokens=9, stop=[string])
    assert list(decoder.texts(params, lines)) == [text.split(string)[0] for text in plain]
    cut = {i for i, text in enumerate(plain, start=1) if string in text}
    assert cut and not cut & decoder.stats.unended


@pytest.mark.parametrize("name", ["greedy", "beam_search"])
def test_what_is_no_number_is_no_answer_with_stops_either(name):
    model, params = make_model(DecoderOnly)
    table = params["embedding"]["table"][...].copy()
    table[5, 3] = np.nan
    params["embedding"]["table"] = params["embedding"]["table"].replace(table)
    generator = make_generator(model, SEARCHES[name], stop=Stop(["zz"], letters))
    answers = generator(params, [[BOS, 4], [BOS, 5]])
    with pytest.raises(ValueError, match="prompt 2: .* NaN or infinite behind 0 new tokens"):
        for i, _ in answers:
            assert i == 0


def test_what_comes_behind_a_stop_is_nobodys_fault():
    """In the same part of a decode, when the rules leave no token there."""
    model, params = make_model(DecoderOnly)
    search = functools.partial(greedy, rules=[NoRepeatNgram(1)])
    [free] = make_generator(model, search, max_new_tokens=4).tokens(params, [[BOS, 4]])
    stop = Stop([letters(free[:2])], letters)
    generator = make_generator(model, search, max_new_tokens=20, stop=stop)
    assert generator.tokens(params, [[BOS, 4]]) == [free[:2]]
    for every in (1, 3, 50):
        pieces = generator.stream(params, [[BOS, 4]], every=every)
        assert [id for piece in pieces for id in piece.ids] == free[:2]
    [(_, decoded)] = generator(params, [[BOS, 4]])
    assert decoded.tokens.shape == (20,)


def test_what_makes_no_sense():
    model, params = make_model(DecoderOnly)
    beams = make_generator(model, functools.partial(beam_search, beam_size=2))
    with pytest.raises(ValueError, match="only greedy and sample, .* can be streamed"):
        beams.stream(params, PROMPTS)
    generator = make_generator(model, greedy)
    for every in (0, 1.0, 2**31):
        with pytest.raises(ValueError, match="every must be"):
            generator.stream(params, PROMPTS, every=every)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generator.stream(params, [[]])
    for strings in ("stop", [], [""], [3]):
        with pytest.raises(ValueError, match="stop must be strings that are not empty"):
            Stop(strings, letters)
    table = params["embedding"]["table"][...].copy()
    table[5, 3] = np.nan
    params["embedding"]["table"] = params["embedding"]["table"].replace(table)
    with pytest.raises(ValueError, match="prompt 1: .* NaN or infinite behind 0 new tokens"):
        list(generator.stream(params, [[BOS, 5]]))
