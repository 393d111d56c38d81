"""`generate`, `Generator` and `LineDecoder` against full forward passes, a line at a time.

B batch   S source length   T target length   R rows, batch times beam
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mqa_jax import (
    Decoded,
    DecoderOnly,
    EncoderDecoder,
    TransformerConfig,
    beam_search,
    greedy,
    sample,
)
from mqa_jax.core.sharding import ShardingRules, make_mesh
from mqa_jax.decode.batches import BUCKET
from mqa_jax.decode.generate import Generator
from mqa_jax.decode.lines import LineDecoder
from mqa_jax.decode.prompts import generate, left_aligned
from mqa_jax.decode.rules import MinNewTokens, NoRepeatNgram
from mqa_jax.measure.timing import no_compilation

BOS, EOS, END = 1, 2, 11  # EOS ends what is given, END what is decoded: a token that comes by soon.
MAX_LENGTH = 40
CONFIG = TransformerConfig(
    vocab_size=13,
    d_model=12,
    d_ff=17,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=5,
    max_length=MAX_LENGTH,
    window=7,
)
MODELS = [EncoderDecoder, DecoderOnly]
SEARCHES = {
    "greedy": functools.partial(greedy, eos_id=END),
    "sample": functools.partial(sample, eos_id=END, temperature=0.7),
    "beam_search": functools.partial(beam_search, beam_size=3, eos_id=END),
}
both_models = pytest.mark.parametrize("model_type", MODELS)


class Words:
    """A tokenizer for lines of ids."""

    begin_ids, end_ids = (), (EOS,)

    def encode(self, text):
        return [*map(int, text.split()), EOS]

    encode_target = encode

    def decode(self, ids):
        return " ".join(map(str, ids))


def make_lines(*lengths):
    """Lines of that many words, so of one token more."""
    rng = np.random.default_rng(0)
    return [" ".join(map(str, rng.integers(3, 13, length))) for length in lengths]


def make_model(model_type, seed=13, **changes):
    """A model of shapes, and weights from NumPy, since JAX would compile for every shape."""
    config, rng = dataclasses.replace(CONFIG, **changes), np.random.default_rng(seed)
    model = nnx.eval_shape(lambda: model_type(config, rngs=nnx.Rngs(0)))
    random = functools.partial(rng.normal, scale=0.5)
    params = jax.tree.map(lambda x: random(size=x.shape).astype(np.float32), nnx.state(model))
    return model, params


def make_decoder(model, search, **options):
    options = dict(batch_size=3, bos_id=BOS) | options
    return LineDecoder(model, Words(), search=search, **options)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="max_new_tokens")
def decode_slowly(graphdef, search, params, ids_S, length, key, *, max_new_tokens):
    """One line, and for every step a forward pass over all that came before, without a cache."""
    model = nnx.merge(graphdef, params)
    is_source_1S = jnp.arange(MAX_LENGTH)[None] < length

    def step_fn(tokens_R, cache):
        inputs_RT, at_R = cache["inputs"], cache["length"]
        rows_R = jnp.arange(tokens_R.shape[0])
        inputs_RT = inputs_RT.at[rows_R, at_R].set(tokens_R)
        if isinstance(model, DecoderOnly):
            logits_RTV = model(inputs_RT)
        else:
            rows = (rows_R.size, MAX_LENGTH)
            logits_RTV = model(
                jnp.broadcast_to(ids_S[None], rows),
                inputs_RT,
                source_segment_ids=jnp.broadcast_to(is_source_1S.astype(jnp.int32), rows),
                target_segment_ids=jnp.ones(rows, jnp.int32),
            )
        return logits_RTV[rows_R, at_R], {"inputs": inputs_RT, "length": at_R + 1}

    if isinstance(model, DecoderOnly):
        inputs_T = jnp.concatenate([jnp.full(1, BOS), ids_S[:-1]])
        last, length = inputs_T[length - 1], length - 1
    else:
        inputs_T, last, length = jnp.zeros_like(ids_S), jnp.int32(BOS), jnp.int32(0)
    cache = {"inputs": inputs_T[None], "length": length[None]}
    options = {} if key is None else {"key": key[None]}
    decoded = search(step_fn, cache, last[None], max_new_tokens=max_new_tokens, **options)
    return jax.tree.map(lambda x: x[0], dataclasses.replace(decoded, steps=None))


def same(actual, expected):
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.length, expected.length)
    assert (actual.score is None) == (expected.score is None)
    if actual.score is not None:
        # float32 sums in another order.
        np.testing.assert_allclose(actual.score, expected.score, rtol=1e-4, atol=1e-4)


@both_models
@pytest.mark.parametrize("name", SEARCHES)
def test_lines_are_decoded_as_if_each_were_alone(model_type, name):
    """Batches that mix lengths, a last one that is not full, an empty line, and two widths."""
    search, limit = SEARCHES[name], 6
    model, params = make_model(model_type)
    lines = make_lines(3, 19 if name == "greedy" else 9, 0, 11, 14, 7, 1)
    keys = jax.random.split(jax.random.key(3), len(lines)) if name == "sample" else None
    decoder = make_decoder(model, search, max_new_tokens=limit)
    results = list(decoder(params, lines, keys))
    assert sorted(i for i, _ in results) == list(range(len(lines)))
    by_index, lengths = dict(results), set()
    for i, line in enumerate(lines):
        ids_S = np.zeros(MAX_LENGTH, np.int32)
        ids_S[: len(Words().encode(line))] = Words().encode(line)
        length, key = np.int32(len(line.split()) + 1), None if keys is None else keys[i]
        graphdef = nnx.graphdef(model)
        expected = decode_slowly(graphdef, search, params, ids_S, length, key, max_new_tokens=limit)
        same(by_index[i], expected)
        lengths |= set(np.atleast_1d(expected.length).tolist())
    assert len(lengths) > 1, "some lines should end early"
    stats, best = decoder.stats, [int(d.length.flat[0]) for _, d in results]
    assert stats.tokens == sum(best) and stats.compile_seconds > 0 and stats.decode_seconds > 0
    steps = [int(decoded.steps) for _, decoded in results]
    assert stats.steps == steps[0] + steps[3] + steps[6], "the steps of three batches"
    assert stats.rows == sum(steps), "a prompt counts once a step of its batch"

    order = np.array([4, 0, 6, 2, 1, 5, 3])
    shuffled = [lines[i] for i in order]
    for i, decoded in decoder(params, shuffled, None if keys is None else keys[order]):
        same(decoded, by_index[order[i]])


def record(log, step_fn, cache, last_B, *, max_new_tokens):
    """A search that decodes nothing, and compiles in no time: the last prompt token, repeated."""
    log.append((cache[0].key.shape, max_new_tokens))
    tokens_BL = jnp.broadcast_to(last_B[:, None], (last_B.size, max_new_tokens))
    return Decoded(tokens_BL, jnp.full_like(last_B, max_new_tokens), jnp.int32(1))


@both_models
@pytest.mark.parametrize("name", ["greedy", "beam_search"])
def test_rows_over_devices_are_decoded_as_on_one(model_type, name):
    """Each device by itself: what they compile to has no word of the others within."""
    mesh = make_mesh()
    rows = NamedSharding(mesh, PartitionSpec(ShardingRules().B))
    options = dict(batch_size=16, max_new_tokens=6)
    model, params = make_model(model_type)
    one = make_decoder(model, SEARCHES[name], **options)
    many = make_decoder(model, SEARCHES[name], rows=rows, **options)
    over_all = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    lines = make_lines(*range(14), *range(14))
    alone = dict(one(params, lines))
    for i, decoded in many(over_all, lines):
        same(decoded, alone[i])
    assert many.stats.steps == one.stats.steps and many.stats.tokens == one.stats.tokens
    for program in many._compiled.values():
        assert not re.search("all-gather|all-to-all|collective-permute", program.as_text())
    scores = dict(one.score(params, lines[1:], lines[1:]))
    for i, score in many.score(over_all, lines[1:], lines[1:]):
        np.testing.assert_allclose(score, scores[i], rtol=1e-5)
    if name == "greedy":
        with pytest.raises(ValueError, match="streams are for rows on one device"):
            list(Generator.stream(many, over_all, [[3]]))
    with pytest.raises(ValueError, match="end an answer are for rows on one device"):
        make_decoder(model, SEARCHES[name], rows=rows, stop=["7"], **options)


@both_models
def test_the_default_limit_does_not_depend_on_the_lines_beside(model_type):
    model, params = make_model(model_type, max_length=90)
    decoder = make_decoder(model, functools.partial(record, []))
    lines = make_lines(2, 20, 80)
    together = dict(decoder(params, lines))
    for i, tokens in enumerate((3, 21, 81)):
        [(_, alone)] = decoder(params, [lines[i]])
        assert together[i].length == alone.length
        # 50 more than the line has, or up to a bucket more, or what there is room for.
        room = 90 - (model_type is DecoderOnly) * tokens
        assert min(tokens + 50, room) <= alone.length <= tokens + 50 + BUCKET


@both_models
@pytest.mark.parametrize("max_new_tokens", [None, 4])
def test_a_corpus_compiles_once_a_bucket(model_type, max_new_tokens):
    log, max_length = [], MAX_LENGTH
    if is_open := model_type is DecoderOnly and max_new_tokens is None:
        max_length = 4 * BUCKET * 2 + 50  # Nearer to the end than this, each length by itself.
    model, params = make_model(model_type, max_length=max_length)
    decoder = make_decoder(model, functools.partial(record, log), max_new_tokens=max_new_tokens)
    # As long as they may be: 40 tokens with the end of sentence, or less what is to be decoded.
    longest = MAX_LENGTH - 1 - (model_type is DecoderOnly) * ((max_new_tokens or 1) - 1)
    longest = 4 * BUCKET - 1 if is_open else longest
    lines = make_lines(*range(longest + 1 - (model_type is DecoderOnly)))
    assert len(list(decoder(params, lines))) == len(lines)
    assert 1 < len(log) <= -(-(longest + 1) // BUCKET), log
    traces = len(log)
    list(decoder(jax.tree.map(np.zeros_like, params), lines[::-1]))
    assert len(log) == traces, "other weights are no reason to compile again"


def test_what_the_search_begins_with():
    log, lines = [], make_lines(4, 0, 2)
    for model_type in MODELS:
        model, params = make_model(model_type)
        decoder = make_decoder(model, functools.partial(record, log), max_new_tokens=2)
        begins = {i: decoded.tokens.tolist() for i, decoded in decoder(params, lines)}
        last = [int(line.split()[-1]) if line else BOS for line in lines]
        if model_type is EncoderDecoder:
            last = [BOS] * 3
        assert begins == {i: [token] * 2 for i, token in enumerate(last)}


@both_models
@pytest.mark.parametrize("max_new_tokens", [None, 4])
def test_too_long_a_line_is_refused_before_any_is_decoded(model_type, max_new_tokens):
    log, (model, params) = [], make_model(model_type)
    decoder = make_decoder(model, functools.partial(record, log), max_new_tokens=max_new_tokens)
    room, words = {
        (EncoderDecoder, None): (40, 39),
        (EncoderDecoder, 4): (40, 39),
        (DecoderOnly, None): (39, 38),
        (DecoderOnly, 4): (36, 35),
    }[model_type, max_new_tokens]
    lines = make_lines(3, 5, words + 1, 2)
    with pytest.raises(ValueError, match=f"line 3 has {room + 1} tokens, .* room for {room} "):
        next(decoder(params, lines))
    assert log == []
    assert len(list(decoder(params, make_lines(3, words)))) == 2


@both_models
def test_other_lengths_inside_a_bucket_compile_nothing(model_type):
    model, params = make_model(model_type)
    params = jax.tree.map(jnp.asarray, params)
    search = functools.partial(greedy, eos_id=EOS)
    generator = Generator(model, search=search, batch_size=2, bos_id=BOS, max_new_tokens=6)
    first = generator.tokens(params, [[BOS, 5, 7]])
    assert len(first) == 1 and 1 <= len(first[0]) <= 6
    with no_compilation():
        again = generator.tokens(params, [[BOS] * BUCKET, [BOS, 5, 7], [4]])
    assert len(again) == 3 and again[1] == first[0]
    with pytest.raises(RuntimeError, match="compiled while"), no_compilation():
        generator.tokens(params, [[BOS] * (BUCKET + 1)])
    expected = {i: decoded.tokens[: decoded.length] for i, decoded in generator(params, [[4]])}
    assert again[2] == expected[0].tolist()


@both_models
def test_a_prompt_without_tokens_is_refused(model_type):
    model, params = make_model(model_type)
    generator = Generator(model, search=greedy, batch_size=2, bos_id=BOS)
    with pytest.raises(ValueError, match="prompt 2 has no tokens"):
        generator.tokens(params, [[4], []])


@both_models
@pytest.mark.parametrize(
    "prompt, message",
    [
        ([4, 13], "prompt 2 has the id 13 at index 1, but the vocabulary has 13 tokens"),
        ([-1, 4], "prompt 2 has the id -1 at index 0"),
        ([4, 2**40], f"prompt 2 has the id {2**40} at index 1"),
        ([4.0], r"prompt 2 must be a sequence of integers, the ids, not \[4\.0\]"),
        ([True], r"prompt 2 must be .* not \[True\]"),
        ([[4]], r"prompt 2 must be .* not \[\[4\]\]"),
        ([4, [5]], r"prompt 2 must be .* not \[4, \[5\]\]"),
        ("4", "prompt 2 must be .* not '4'"),
        (4, "prompt 2 must be .* not 4"),
    ],
)
def test_ids_that_the_model_cannot_know_are_refused(model_type, prompt, message):
    log, (model, params) = [], make_model(model_type)
    search = functools.partial(record, log)
    generator = Generator(model, search=search, batch_size=2, bos_id=BOS)
    with pytest.raises(ValueError, match=message):
        generator(params, [[4, 12], prompt, [5]])
    assert log == []
    assert len(list(generator(params, [[0, 12], np.array([3], np.uint8)]))) == 2


def test_a_beam_search_that_has_nothing_left_says_so():
    """As greedy decoding does: a token comes once, and then there is none."""
    model, params = make_model(DecoderOnly)
    for search in (greedy, functools.partial(beam_search, beam_size=2)):
        search = functools.partial(search, rules=[NoRepeatNgram(1)])
        generator = Generator(model, search=search, batch_size=2, bos_id=BOS, max_new_tokens=20)
        with pytest.raises(ValueError, match="prompt 1: .* no token was left by the rules"):
            generator.tokens(params, [[0, 7]])


def test_weights_of_another_kind_are_another_program():
    """A dtype, a place: what was compiled for the ones does not take the others."""
    model, params = make_model(DecoderOnly)
    generator = Generator(model, search=greedy, batch_size=2, bos_id=BOS, max_new_tokens=3)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    elsewhere = jax.device_put(params, jax.devices()[3])
    for other in (params, narrow, elsewhere, jax.tree.map(np.asarray, params)):
        [found] = generator.tokens(other, [[0, 5]])
        assert [id for piece in generator.stream(other, [[0, 5]]) for id in piece.ids] == found
        [(_, scores)] = generator.score(other, [[0, 5]], [found])
        assert len(scores) == 3


@both_models
def test_numbers_of_a_generator(model_type):
    model, params = make_model(model_type)
    make = functools.partial(Generator, model, search=greedy)
    for options, message in [
        (dict(batch_size=0), "batch_size must be at least 1, not 0"),
        (dict(batch_size=2.0), r"batch_size must be an integer, not 2\.0"),
        (dict(bos_id=13), "bos_id=13 is not in the vocabulary of 13"),
        (dict(bos_id=-1), "bos_id=-1 is not in the vocabulary of 13"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, not 0"),
        (dict(max_new_tokens=-1), "max_new_tokens must be at least 1, not -1"),
        (dict(max_new_tokens=True), "max_new_tokens must be an integer, not True"),
        (dict(search="greedy"), "search must be a function, such as mqa_jax.greedy"),
        (dict(search=functools.partial(greedy, max_new_tokens=2)), "max_new_tokens is given to"),
        (dict(search=functools.partial(sample, key=jax.random.key(0))), "key is given to the gen"),
        (dict(search=functools.partial(greedy, steps=2)), "steps is given to the generator"),
        (
            dict(search=functools.partial(sample, temperature=[1, 2])),
            r"temperature is \[1, 2\], one",
        ),
        (
            dict(search=functools.partial(greedy, rules=[MinNewTokens(np.array([2, 3]), 1)])),
            "count of MinNewTokens is array.*one a row",
        ),
        (dict(stop=["x"]), r"stop must be Stop\(strings, tokenizer.decode\), not \['x'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**dict(batch_size=2, bos_id=BOS) | options)
    with pytest.raises(ValueError, match=r"such as hub.load\(...\).model, not a dict"):
        Generator({}, search=greedy, batch_size=2, bos_id=BOS)
    if model_type is DecoderOnly:
        with pytest.raises(ValueError, match="max_new_tokens=40 leaves no room .* 40 positions"):
            make(batch_size=2, bos_id=BOS, max_new_tokens=MAX_LENGTH)
    for search, message in [
        (functools.partial(greedy, eos_id=13), "eos_id=13 is not in the vocabulary of 13"),
        (functools.partial(greedy, pad_id=-1), "pad_id=-1 is not in the vocabulary of 13"),
    ]:
        with pytest.raises(ValueError, match=message):
            Generator(model, search=search, batch_size=2, bos_id=BOS).tokens(params, [[4]])
    numbers = dict(batch_size=2, bos_id=BOS, max_new_tokens=3)
    expected = make(**numbers).tokens(params, [[4]])
    arrays = jax.tree.map(jnp.int32, numbers)
    assert make(**arrays).tokens(params, [[4]]) == expected


@both_models
def test_weights_that_are_not_the_models(model_type):
    model, params = make_model(model_type)
    generator = Generator(model, search=greedy, batch_size=2, bos_id=BOS, max_new_tokens=3)
    _, wider = make_model(model_type, vocab_size=14)
    for wrong, message in [
        (jax.tree.map(lambda x: x.astype(np.int32), params), "must be floats .* not int32"),
        (wider, r"params.*embedding.*table.* floats \[13, 12\], .* not float32 \[14, 12\]"),
        ({}, "params are 0 arrays"),
        (model, r"params are the weights, nnx.state\(model\), not a (En|De)coder"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(generator(wrong, [[4]]))


@both_models
def test_a_key_for_every_prompt(model_type):
    model, params = make_model(model_type)
    decoder = make_decoder(model, SEARCHES["sample"], max_new_tokens=3)
    lines, key = make_lines(2, 3), jax.random.key(0)
    with pytest.raises(ValueError, match="this search draws, and needs keys, one for each prompt"):
        decoder.tokens(params, lines)
    greedily = make_decoder(model, SEARCHES["greedy"], max_new_tokens=3)
    with pytest.raises(ValueError, match="keys are for a search that draws, such as sample"):
        greedily.stream(params, lines, jax.random.split(key, 2))
    for keys, shape in [(jax.random.split(key, 1), r"\[1\]"), (key, r"\[\]")]:
        for decode in (decoder, decoder.texts):
            with pytest.raises(ValueError, match=rf"one PRNG key a prompt, \[2\], not {shape}"):
                decode(params, lines, keys)
    old = decoder.tokens(params, lines, jax.random.split(jax.random.PRNGKey(0)))
    assert old == decoder.tokens(params, lines, jax.random.split(key))


@both_models
@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_no_number_is_no_answer(model_type, name):
    """Those before are given; the one of which nothing can be decoded is named."""
    model, params = make_model(model_type)
    decoder = make_decoder(model, SEARCHES[name], max_new_tokens=1)
    keys = jax.random.split(jax.random.key(0), 3) if name == "sample" else None
    # Token 5 is in one prompt alone.
    table = params["embedding"]["table"][...].copy()
    table[5, 3] = np.nan
    params["embedding"]["table"] = params["embedding"]["table"].replace(table)
    answers = decoder(params, ["4 7 3", "4 5 3", "4"], keys)
    if model_type is EncoderDecoder:
        # Its softmax weights are the table.
        message = "line 3: .* NaN or infinite behind 0 new tokens.* weights"
    else:
        assert next(answers)[0] == 2
        message = "line 2: .* NaN or infinite behind 0 new tokens.* weights"
    with pytest.raises(ValueError, match=message):
        for i, decoded in answers:
            assert i == 0 and decoded.is_finite


@both_models
def test_prompts_of_generate(model_type):
    """Checked where they are known; where they are traced the answer is flagged."""
    model, params = make_model(model_type)
    merged = nnx.merge(nnx.graphdef(model), jax.tree.map(jnp.asarray, params))
    options = dict(search=greedy, bos_id=BOS, max_new_tokens=2)
    run = functools.partial(generate, merged, **options)
    prompt_BP = np.array([[4, 5, 6], [7, 8, -100]])
    for prompt, lengths, message in [
        (prompt_BP, [3, 0], r"lengths_B\[1\] must be from 1 to 3, not 0"),
        (prompt_BP, [-1, 2], r"lengths_B\[0\] must be from 1 to 3, not -1"),
        (prompt_BP, [4, 2], r"lengths_B\[0\] must be from 1 to 3, not 4"),
        (prompt_BP, [3, 3], r"prompt_BP\[1, 2\]=-100 is not in the vocabulary of 13"),
        (prompt_BP + 7, [3, 2], r"prompt_BP\[0, 2\]=13 is not in the vocabulary of 13"),
        (prompt_BP, [3.0, 2.0], "lengths_B must be integers, not float"),
        (prompt_BP.astype(np.float32), [3, 2], "prompt_BP must be integers, not float32"),
        (prompt_BP, [3], r"not \[2, 3\] and \[1\]"),
        (prompt_BP[0], [3, 2], r"not \[3\] and \[2\]"),
        (prompt_BP[:0], [], r"not \[0, 3\] and \[0\]"),
        (prompt_BP.tolist(), [True, True], "lengths_B must be integers, not bool"),
    ]:
        for kind in (np.asarray, jnp.asarray, lambda x: np.asarray(x).tolist()):
            with pytest.raises(ValueError, match=message):
                run(prompt, kind(lengths))
    with pytest.raises(ValueError, match="bos_id=13 is not in the vocabulary of 13"):
        run(prompt_BP, np.array([3, 2]), bos_id=13)
    traced = jax.jit(lambda *arrays: dataclasses.replace(run(*arrays), cache=None))
    whole = traced(np.abs(prompt_BP) % 13, np.array([3, 2]))
    assert np.all(whole.is_finite)
    for length in (0, -1, -7, 4):
        broken = traced(np.abs(prompt_BP) % 13, np.array([3, length]))
        np.testing.assert_array_equal(broken.is_finite, [True, False])
        np.testing.assert_array_equal(broken.tokens[0], whole.tokens[0])
        np.testing.assert_array_equal(broken.length, [2, 0])


@both_models
def test_prompts_padded_on_the_left(model_type):
    """By `left_aligned`, traced or not; and a full pass takes them as they are."""
    model = model_type(CONFIG, rngs=nnx.Rngs(0))
    rows = [[BOS, 5, 7, 3], [BOS, 9], [BOS, 4, 4, 8, 6, 3]]
    lengths_B = np.array([len(row) for row in rows])
    left_BP = np.array([[0] * (6 - len(row)) + row for row in rows])
    right_BP = np.array([row + [0] * (6 - len(row)) for row in rows])
    for aligned in (left_aligned, jax.jit(left_aligned)):
        np.testing.assert_array_equal(aligned(left_BP, lengths_B), right_BP)
        vectors = aligned(np.stack([left_BP, -left_BP], axis=2), lengths_B)
        np.testing.assert_array_equal(vectors, np.stack([right_BP, -right_BP], axis=2))
    if model_type is DecoderOnly:
        index_BP = np.arange(6)[None] - (6 - lengths_B)[:, None]
        logits_BPV = compiled(model)(
            left_BP,
            segment_ids=(index_BP >= 0).astype(np.int32),
            positions=np.maximum(index_BP, 0),
        )
        for row, logits_PV in zip(rows, logits_BPV, strict=True):
            alone = compiled(model)(np.array([row]))[0]
            np.testing.assert_allclose(logits_PV[-len(row) :], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"lengths_B\[1\] .*7"):
        left_aligned(left_BP, np.array([4, 7, 6]))
    with pytest.raises(ValueError, match=r"not \[3, 6\] and \[2\]"):
        left_aligned(left_BP, lengths_B[:2])


@both_models
def test_no_lines(model_type):
    model, params = make_model(model_type)
    assert list(make_decoder(model, greedy)(params, [])) == []


@both_models
def test_weights_are_cast_once_before_the_loop(model_type):
    """The search's own step sees weights of the activations' dtype: no step reads wider ones."""
    seen, (model, params) = [], make_model(model_type, dtype="bfloat16")

    def search(step_fn, cache, last_B, *, max_new_tokens):
        owner = step_fn.args[0] if isinstance(step_fn, functools.partial) else step_fn.__self__
        seen.extend(x.dtype for x in jax.tree.leaves(nnx.state(owner)) if x.ndim > 1)
        return record([], step_fn, cache, last_B, max_new_tokens=max_new_tokens)

    decoder = make_decoder(model, search, max_new_tokens=2)
    assert len(list(decoder(params, make_lines(3)))) == 1
    assert set(seen) == {jnp.bfloat16.dtype}


@pytest.mark.parametrize("model_type, tokens", [(EncoderDecoder, (5, 41)), (DecoderOnly, (5, 36))])
def test_prompt_and_answer_must_fit(model_type, tokens):
    prompt_length, max_new_tokens = tokens
    model, params = make_model(model_type)
    merged = nnx.merge(nnx.graphdef(model), jax.tree.map(jnp.asarray, params))
    prompt_BP, lengths_B = jnp.full((3, prompt_length), 4), jnp.full(3, prompt_length)
    options = dict(search=greedy, bos_id=BOS)
    with pytest.raises(ValueError, match="41 tokens, but the model knows 40 positions"):
        jax.jit(
            lambda: generate(merged, prompt_BP, lengths_B, max_new_tokens=max_new_tokens, **options)
        )()
