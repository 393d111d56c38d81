"""What is given with a prompt: the beginning of its answer, the answer itself, what rules see.

B batch   P prompt length   T answer length
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_generate import BOS, END, MAX_LENGTH, MODELS, SEARCHES, make_model

from mqa_jax import DecoderOnly, EncoderDecoder, beam_search, greedy, sample
from mqa_jax.decode.generate import Generator
from mqa_jax.decode.prompts import generate, score
from mqa_jax.decode.rules import NoRepeatNgram, PresencePenalty

both_models = pytest.mark.parametrize("model_type", MODELS)
slow_but_greedy = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "greedy" else pytest.mark.slow) for name in SEARCHES],
)
PROMPTS = [[BOS, 5, 7, 3], [BOS, 4], [BOS, *range(3, 11), *range(3, 11), 6], [BOS, 8, 8]]


def make_generator(model, search, **options):
    options = dict(batch_size=3, bos_id=BOS, max_new_tokens=6) | options
    return Generator(model, search=search, **options)


def merged(model, params):
    return nnx.merge(nnx.graphdef(model), jax.tree.map(jnp.asarray, params))


def logits_of(model, source_S, length, inputs_RT):
    """`[R, T, V]`, by a full forward pass; a language model's inputs begin with the prompt."""
    if isinstance(model, DecoderOnly):
        return model(inputs_RT)
    rows = inputs_RT.shape[0]
    is_source_S = (jnp.arange(source_S.size) < length).astype(jnp.int32)
    return model(
        jnp.broadcast_to(source_S[None], (rows, source_S.size)),
        inputs_RT,
        source_segment_ids=jnp.broadcast_to(is_source_S[None], (rows, source_S.size)),
        target_segment_ids=jnp.ones_like(inputs_RT),
    )


@functools.partial(jax.jit, static_argnums=0)
def log_probs_of(graphdef, params, source_S, length, inputs_T):
    logits_TV = logits_of(nnx.merge(graphdef, params), source_S, length, inputs_T[None])[0]
    return jax.nn.log_softmax(logits_TV.astype(jnp.float32))


def padded(ids):
    return np.array([*ids, *[0] * (MAX_LENGTH - len(ids))], np.int32)


def expected_scores(model, params, prompt, answer):
    """The log-probability of each id of an answer."""
    before = prompt if isinstance(model, DecoderOnly) else [BOS]
    inputs_T = padded([*before, *answer[:-1]])
    log_prob_TV = log_probs_of(
        nnx.graphdef(model), params, padded(prompt), np.int32(len(prompt)), inputs_T
    )
    at = np.arange(len(answer)) + len(before) - 1
    return np.asarray(log_prob_TV)[at, np.array(answer)]


@both_models
def test_scores_of_given_answers(model_type):
    """Of several lengths, one of them alone in its bucket, and one up to the last position."""
    model, params = make_model(model_type)
    generator = make_generator(model, greedy)
    longest = MAX_LENGTH - (model_type is DecoderOnly) * len(PROMPTS[2])
    answers = [[4, 6, 2], [7], [*range(3, 13)] * 4, [3, 5, 5, 12, 2]]
    answers[2] = answers[2][:longest]
    scores = dict(generator.score(params, PROMPTS, answers))
    assert sorted(scores) == [0, 1, 2, 3]
    for i, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        expected = expected_scores(model, params, prompt, answer)
        np.testing.assert_allclose(scores[i], expected, rtol=1e-4, atol=1e-4)


@both_models
@slow_but_greedy
def test_the_scores_of_tokens_are_those_of_the_same_answer_given(model_type, name):
    model, params = make_model(model_type)
    search = functools.partial(SEARCHES[name], token_scores=True)
    keys = jax.random.split(jax.random.key(0), len(PROMPTS)) if name == "sample" else None
    generator, found = make_generator(model, search), []
    for i, decoded in generator(params, PROMPTS, keys):
        tokens, scores = decoded.tokens.reshape(-1, 6), decoded.token_scores.reshape(-1, 6)
        for ids, length, own in zip(tokens, decoded.length.reshape(-1), scores, strict=True):
            found.append((PROMPTS[i], ids[:length], own[:length]))
            assert not np.any(own[length:])
    assert len(found) == len(PROMPTS) * (3 if name == "beam_search" else 1)
    prompts, answers, scores = zip(*found, strict=True)
    for i, given in generator.score(params, prompts, answers):
        np.testing.assert_allclose(scores[i], given, rtol=1e-4, atol=1e-4)


@slow_but_greedy
def test_a_translation_that_has_begun(name):
    """As if the search were at that place: each row behind a prefix of its own, one of none."""
    model, params = make_model(EncoderDecoder)
    prefixes = [[4, 6], [], [9, 3, 3, 12, 5], [7]]
    keys = jax.random.split(jax.random.key(0), len(PROMPTS)) if name == "sample" else None
    search = SEARCHES[name]
    generator = make_generator(model, search)
    decoded = dict(generator(params, PROMPTS, keys, prefixes=prefixes))
    assert sorted(decoded) == [0, 1, 2, 3]

    @jax.jit
    def run(params, source_S, length, history_T, prefix_length, key):
        model_in = nnx.merge(nnx.graphdef(model), params)

        def step_fn(tokens_R, cache):
            history_RT, at_R = cache["history"], cache["length"]
            rows_R = jnp.arange(tokens_R.shape[0])
            history_RT = history_RT.at[rows_R, at_R].set(tokens_R)
            logits_RTV = logits_of(model_in, source_S, length, history_RT)
            return logits_RTV[rows_R, at_R], {"history": history_RT, "length": at_R + 1}

        cache = {"history": history_T[None], "length": prefix_length[None]}
        options = {} if key is None else {"key": key[None]}
        return search(step_fn, cache, history_T[prefix_length][None], max_new_tokens=6, **options)

    for i, (prompt, prefix) in enumerate(zip(PROMPTS, prefixes, strict=True)):
        lengths = np.int32(len(prompt)), padded([BOS, *prefix]), np.int32(len(prefix))
        key = None if keys is None else keys[i]
        expected = run(params, padded(prompt), *lengths, key)
        np.testing.assert_array_equal(decoded[i].tokens, expected.tokens[0])
        np.testing.assert_array_equal(decoded[i].length, expected.length[0])
        if name == "beam_search":
            np.testing.assert_allclose(decoded[i].score, expected.score[0], rtol=1e-4, atol=1e-4)


def test_a_prefix_up_to_the_last_position():
    model, params = make_model(EncoderDecoder)
    generator = make_generator(model, greedy)
    [(_, decoded)] = generator(params, [[5]], prefixes=[[4] * (MAX_LENGTH - 1)])
    assert decoded.length == 1
    last = [4] * (MAX_LENGTH - 1)
    scores = [expected_scores(model, params, [5], [*last, id])[-1] for id in range(13)]
    assert decoded.tokens[0] == np.argmax(scores)


def test_a_prefix_takes_its_own_length_of_the_positions():
    model, params = make_model(EncoderDecoder)
    generator = Generator(model, search=greedy, batch_size=2, bos_id=0, max_new_tokens=30)
    prefixes = [[4] * length for length in (1, 17, 30, 38)]
    found = dict(generator(params, [[5]] * len(prefixes), prefixes=prefixes))
    for i, prefix in enumerate(prefixes):
        assert found[i].length == min(30, MAX_LENGTH - len(prefix))


@pytest.mark.parametrize("name", SEARCHES)
def test_rules_see_the_prompt_of_a_language_model(name):
    """And no one else's: each row may say what the others have in their prompts."""
    model, params = make_model(DecoderOnly)
    search = functools.partial(SEARCHES[name], rules=[NoRepeatNgram(1)])
    keys = jax.random.split(jax.random.key(0), len(PROMPTS)) if name == "sample" else None
    said = set()
    prompts = [prompt for prompt in PROMPTS if len(prompt) < 9]
    keys = None if keys is None else keys[: len(prompts)]
    for i, decoded in make_generator(model, search)(params, prompts, keys):
        for ids, length in zip(
            decoded.tokens.reshape(-1, 6), decoded.length.reshape(-1), strict=True
        ):
            text = [*prompts[i], *ids[:length].tolist()]
            new = text[len(prompts[i]) :]
            assert len({*new}) == len(new) and not {*new} & {*prompts[i]}
            said |= {*new}
    assert said & {5, 7, 3, 4, 8}


def test_rules_see_the_prefix_and_not_the_source_of_a_translation():
    model, params = make_model(EncoderDecoder)
    search = functools.partial(greedy, rules=[NoRepeatNgram(1)])
    for i, decoded in make_generator(model, search)(
        params, [[5, 7], [4]], prefixes=[[3, 4], [7, 9, 10]]
    ):
        said = [BOS, *([3, 4], [7, 9, 10])[i], *decoded.tokens[: decoded.length].tolist()]
        assert len({*said}) == len(said) and decoded.length == 6


def test_what_has_been_decoded_is_not_the_prompt():
    """A penalty for presence leaves the tokens of the prompt alone."""
    model, params = make_model(DecoderOnly)
    plain = make_generator(model, greedy).tokens(params, PROMPTS)
    search = functools.partial(greedy, rules=[PresencePenalty(100.0)])
    ruled = make_generator(model, search).tokens(params, PROMPTS)
    assert [ids[0] for ids in plain] == [ids[0] for ids in ruled]
    assert all(len({*ids}) == 6 for ids in ruled) and plain != ruled


@both_models
def test_what_makes_no_sense(model_type):
    model, params = make_model(model_type)
    generator = make_generator(model, greedy)
    for answers, message in [
        ([[4]], "answers must be one a prompt, 2, not 1"),
        ([[4], []], "the answer to prompt 2 has no tokens"),
        ([[4], [13]], "the answer to prompt 2 has the id 13 at index 0"),
        ([[4], [4] * 41], "the answer to prompt 2 has 41 tokens, but there is room for 40"),
        ([[4], [4.0]], "the answer to prompt 2 must be a sequence of integers"),
    ]:
        with pytest.raises(ValueError, match=message):
            generator.score(params, [[5], [6]], answers)
    if model_type is DecoderOnly:
        with pytest.raises(ValueError, match="prompt 1 has 2 tokens and its answer 39, but .* 40"):
            generator.score(params, [[5, 5]], [[4] * 39])
        with pytest.raises(ValueError, match="prefixes are for translations"):
            generator(params, [[5], [6]], prefixes=[[4], []])
    else:
        for prefixes, message in [
            ([[4]], "prefixes must be one a prompt, 2, not 1"),
            ([[4], [13]], "the prefix of prompt 2 has the id 13 at index 0"),
            ([[4], [4] * 40], "the prefix of prompt 2 has 40 tokens, but .* 40 positions"),
            ([[4], "4"], "the prefix of prompt 2 must be a sequence of integers"),
        ]:
            with pytest.raises(ValueError, match=message):
                generator(params, [[5], [6]], prefixes=prefixes)
    params["embedding"]["table"] = params["embedding"]["table"].replace(
        np.full_like(params["embedding"]["table"][...], np.nan)
    )
    with pytest.raises(ValueError, match="prompt 1: .* NaN or infinite behind 0 new tokens"):
        list(generator.score(params, [[5]], [[6]]))


@pytest.mark.parametrize(
    "model_type", [pytest.param(EncoderDecoder, marks=pytest.mark.slow), DecoderOnly]
)
def test_lengths_that_are_traced_and_wrong(model_type):
    model, params = make_model(model_type)
    whole = merged(model, params)
    prompt_BP, answer_BT = jnp.array([[4, 5, 6], [7, 8, 9]]), jnp.array([[3, 4], [5, 6]])
    run = functools.partial(score, whole, prompt_BP, bos_id=BOS)

    def traced(lengths, answer_lengths):
        return jax.jit(lambda a, b: run(a, answer_BT, b))(
            jnp.array(lengths), jnp.array(answer_lengths)
        )

    good = traced([3, 2], [1, 2])
    assert np.all(np.isfinite(good)) and good[0, 1] == 0
    np.testing.assert_array_equal(np.isnan(traced([3, 4], [2, 2])).any(axis=1), [False, True])
    for wrong in (3, 0, -1):
        scores = traced([3, 2], [wrong, 2])
        np.testing.assert_array_equal(np.isnan(scores).any(axis=1), [True, False])
    with pytest.raises(ValueError, match=r"answer_lengths_B\[1\] must be from 1 to 2, not 3"):
        run(np.array([3, 2]), answer_BT, np.array([1, 3]))
    with pytest.raises(ValueError, match=r"answer_BT\[0, 0\]=13 is not in the vocabulary"):
        run(np.array([3, 2]), np.array([[13, 1], [1, 1]]), np.array([1, 2]))
    options = dict(search=greedy, bos_id=BOS, max_new_tokens=2)
    prefix = (np.array([[3, 4], [5, 6]]), np.array([0, 3]))
    if model_type is DecoderOnly:
        with pytest.raises(ValueError, match="prefix is for translations"):
            generate(whole, prompt_BP, np.array([3, 2]), prefix=prefix, **options)
        return
    with pytest.raises(ValueError, match=r"prefix_lengths_B\[1\] must be from 0 to 2, not 3"):
        generate(whole, prompt_BP, np.array([3, 2]), prefix=prefix, **options)
    with pytest.raises(ValueError, match=r"prefix_BF must be \[2, F\]"):
        generate(whole, prompt_BP, np.array([3, 2]), prefix=(prefix[0][:1], [1]), **options)
    decoded = jax.jit(
        lambda n: (
            generate(
                whole, prompt_BP, jnp.array([3, 2]), prefix=(prefix[0], n), **options
            ).is_finite
        )
    )(jnp.array([2, 3]))
    np.testing.assert_array_equal(decoded, [True, False])


def test_a_search_of_ones_own_is_told_only_what_it_asks_for():
    model, params = make_model(DecoderOnly)
    seen = []

    def own(step_fn, cache, last_B, *, max_new_tokens):
        return greedy(step_fn, cache, last_B, max_new_tokens=max_new_tokens)

    def asking(step_fn, cache, last_B, *, prompt, **options):
        seen.append(prompt)
        return sample(step_fn, cache, last_B, key=jax.random.key(0), **options)

    for search in (own, asking, functools.partial(beam_search, beam_size=2, eos_id=END)):
        assert len(make_generator(model, search).tokens(params, [[4, 5]])) == 1
    [(tokens_BP, lengths_B)] = seen
    assert tokens_BP.shape == (3, 16) and lengths_B.shape == (3,)
