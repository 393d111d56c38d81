"""Beam search over hand-made models, against plain Python.

B batch   V vocabulary   L max_new_tokens   b beam   R rows
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_models import (
    CLOSE,
    EOS,
    START,
    Chain,
    Historian,
    decode,
    property_test,
    random_model,
    seeds,
)

from mqa_jax import DecoderOnly, EncoderDecoder, TransformerConfig, beam_search, greedy


def penalty(length, alpha):
    return ((5 + length) / 6) ** alpha


def reference_beam_search(model, start, beam_size, length, alpha, ends=(EOS,)):
    """The same algorithm on lists, without an early stop.

    Returns:
      the hypotheses; the step that the search could have stopped at; whether all was finite.
    """
    live, finished, stop, is_finite = [(0.0, (start,))], [], None, True
    for step in range(1, length + 1):
        log_probs = [model.log_prob(history) for _, history in live]
        if np.any(np.isnan(log_probs)):
            # Of no interest to a search that is over.
            is_finite, stop = stop is not None, stop or step
            break
        candidates = [
            (score + log_prob, (*history, token))
            for (score, history), log_prob_V in zip(live, log_probs, strict=True)
            for token, log_prob in enumerate(log_prob_V)
        ]
        best = sorted(candidates, reverse=True)[: (1 + len(ends)) * beam_size]
        ended = [(score / penalty(step, alpha), h) for score, h in best if h[-1] in ends]
        finished = sorted(finished + ended, reverse=True)[:beam_size]
        live = [(score, h) for score, h in best if h[-1] not in ends][:beam_size]
        is_over = len(finished) == beam_size and (
            not live or live[0][0] / penalty(length, alpha) <= finished[-1][0]
        )
        stop = stop or (step if is_over or step == length else None)
    live = [(score / penalty(length, alpha), h) for score, h in live]
    return (finished + live)[:beam_size], stop, is_finite


def all_hypotheses(model, start, vocab_size, length, alpha):
    """Every hypothesis there is, those that end in front, both best first."""
    ended, unended = [], []
    for size in range(1, length + 1):
        for tokens in itertools.product(range(vocab_size), repeat=size):
            is_ended = tokens[-1] == EOS
            if EOS in tokens[:-1] or not (is_ended or size == length):
                continue
            history = (start, *tokens)
            score = sum(model.log_prob(history[: i + 1])[t] for i, t in enumerate(tokens))
            (ended if is_ended else unended).append((score / penalty(size, alpha), history))
    return sorted(ended, reverse=True) + sorted(unended, reverse=True)


def check_hypotheses(decoded, row, expected):
    """`expected`, best first; where there are fewer than the beam is wide, no others exist."""
    beam_size, length = decoded.tokens.shape[1:]
    assert len(expected) <= beam_size
    scores = [score for score, _ in expected]
    np.testing.assert_allclose(decoded.score[row, : len(expected)], scores, **CLOSE)
    np.testing.assert_array_equal(decoded.score[row, len(expected) :], -np.inf)
    for i, (_, (_, *tokens)) in enumerate(expected):
        padded = tokens + [0] * (length - len(tokens))
        np.testing.assert_array_equal(decoded.tokens[row, i], padded)
        assert decoded.length[row, i] == len(tokens)
    assert not np.any(decoded.tokens[row, len(expected) :])
    assert not np.any(decoded.length[row, len(expected) :])


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_a_wide_beam_finds_all_hypotheses_in_order(alpha):
    # 1 + 2 + 4 + 8 hypotheses that end within 4 tokens, and 16 that do not.
    vocab, length, beam, start = 3, 4, 31, [1, 0]
    for seed in range(3):
        model = Historian.random(seed, length, vocab)
        options = dict(beam_size=beam, max_new_tokens=length, eos_id=EOS, alpha=alpha)
        decoded = decode(beam_search, model, start, **options)
        for row, token in enumerate(start):
            expected = all_hypotheses(model, token, vocab, length, alpha)
            assert len(expected) == beam
            check_hypotheses(decoded, row, expected)


@pytest.mark.parametrize(
    "beam, alpha, ends", [(1, 0.6, [EOS]), (2, 1.0, [4, EOS, 6]), (3, 0.0, []), (4, 0.6, [EOS])]
)
@given(
    seed=seeds,
    eos_bias=st.sampled_from([-2.0, 0.0, 2.0]),
    holes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=3),
)
@property_test(40)
def test_a_narrow_beam_is_the_reference_and_stops_when_it_can(
    beam, alpha, ends, seed, eos_bias, holes
):
    """Holes: a token at a position makes NaN of all that follows, as where a cache overflows."""
    vocab, length, start = 7, 6, [1, 4]
    model = Historian.random(seed, length, vocab, eos_bias, holes)
    options = dict(beam_size=beam, max_new_tokens=length, alpha=alpha)
    eos_id = (*ends,) if len(ends) > 1 else ends[0] if ends else None
    decoded = decode(beam_search, model, start, eos_id=eos_id, **options)
    stops, are_finite = [], []
    for row, token in enumerate(start):
        expected, stop, is_finite = reference_beam_search(model, token, beam, length, alpha, ends)
        check_hypotheses(decoded, row, expected)
        stops.append(stop)
        are_finite.append(is_finite)
    assert decoded.steps == max(stops)
    np.testing.assert_array_equal(decoded.is_finite, are_finite)


def test_an_end_that_is_the_whole_vocabulary():
    model = Historian.random(0, 3, 3)
    decoded = decode(beam_search, model, [1], beam_size=5, max_new_tokens=3, eos_id=(0, 1, 2))
    order = np.argsort(-model.log_prob([1]))
    np.testing.assert_array_equal(decoded.tokens[0, :3, 0], order)
    np.testing.assert_array_equal(decoded.length, [[1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(decoded.score[0, 3:], -np.inf)


def test_the_early_stop_is_early_at_times():
    stops = {
        reference_beam_search(Historian.random(s, 6, 7, 2.0), 1, 3, 6, 0.0)[1] for s in range(9)
    }
    assert len(stops) > 1 and min(stops) < 6


def test_a_long_hypothesis_may_overtake_by_the_length_penalty():
    # From 1: the end with 0.5, or with 0.3 a way of certain tokens that ends ten tokens later.
    sure, length = 40.0, 10
    logits_VV = np.full((14, 14), -sure, np.float32)
    logits_VV[1, [EOS, 3, 0]] = np.log([0.5, 0.3, 0.2])
    for token in range(3, 12):
        logits_VV[token, EOS if token == 11 else token + 1] = sure
    logits_VV[0, 0] = sure
    model = Chain(jnp.asarray(np.broadcast_to(logits_VV, (length, 14, 14))))
    options = dict(beam_size=1, max_new_tokens=length, eos_id=EOS)
    short = decode(beam_search, model, [1], alpha=0.0, **options)
    np.testing.assert_array_equal(short.tokens, [[[EOS] + [0] * 9]])
    np.testing.assert_allclose(short.score, [[np.log(0.5)]], **CLOSE)
    assert short.steps == 1
    long = decode(beam_search, model, [1], alpha=1.0, **options)
    np.testing.assert_array_equal(long.tokens, [[[*range(3, 12), EOS]]])
    np.testing.assert_allclose(long.score, [[np.log(0.3) / 2.5]], **CLOSE)


@pytest.mark.parametrize("beam, length", [(9, 2), (40, 3)])
def test_vocabulary_smaller_than_the_beam(beam, length):
    model = Historian.random(1, length, 3)
    options = dict(beam_size=beam, max_new_tokens=length, eos_id=EOS)
    decoded = decode(beam_search, model, [1, 0], **options)
    for row, start in enumerate([1, 0]):
        check_hypotheses(decoded, row, all_hypotheses(model, start, 3, length, 0.6))


def test_impossible_tokens():
    """Logits of minus infinity make no NaN, and their tokens are not chosen."""
    logits_LVV = np.random.default_rng(0).normal(size=(4, 7, 7)).astype(np.float32)
    logits_LVV[..., [0, 5]] = -np.inf
    model = Chain(jnp.asarray(logits_LVV))
    options = dict(beam_size=3, max_new_tokens=4, eos_id=EOS)
    decoded = decode(beam_search, model, [1, 4], pad_id=6, **options)
    assert np.all(np.isfinite(decoded.score))
    assert not np.any(np.isin(decoded.tokens, [0, 5]))


def test_what_follows_an_impossible_token_does_not_count():
    """A beam with fewer hypotheses than it has room for goes on with such tokens: NaN, perhaps."""
    logits_LVV = np.random.default_rng(0).normal(size=(4, 7, 7)).astype(np.float32)
    impossible = [0, EOS, 3, 5, 6]
    logits_LVV[..., impossible] = -np.inf
    broken_LVV = logits_LVV.copy()
    broken_LVV[:, impossible] = np.nan
    options = dict(beam_size=3, max_new_tokens=4, eos_id=EOS)
    expected, actual = (
        decode(beam_search, Chain(jnp.asarray(each)), [1, 4], **options)
        for each in (logits_LVV, broken_LVV)
    )
    assert np.all(actual.is_finite) and np.all(np.isfinite(actual.score))
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.score, expected.score)


def test_beams_share_what_step_fn_closes_over():
    """Element `i` of the batch has rows `i * b ... i * b + b - 1`; a constant is left as it is."""
    batch, beam, vocab, length = 2, 4, 7, 5
    memory_BV, own_BV = np.random.default_rng(0).normal(size=(2, batch, vocab)).astype(np.float32)
    model, seen = Historian.random(0, length, vocab), []

    def search(memory_BV, own_BV, tokens_B):
        def step_fn(tokens_R, cache):
            shapes = {name: leaf.shape for name, leaf in cache.items()}
            seen.append((memory_BV.shape, tokens_R.shape, shapes))
            own_RV = cache.pop("own")
            logits_RV, cache = model.step(tokens_R, cache)
            per_element = (logits_RV + own_RV).reshape(memory_BV.shape[0], -1, vocab)
            return (per_element + memory_BV[:, None]).reshape(-1, vocab), cache | {"own": own_RV}

        cache = model.cache(tokens_B.shape[0]) | {"own": own_BV}
        options = dict(beam_size=beam, max_new_tokens=length, eos_id=EOS)
        return beam_search(step_fn, cache, tokens_B, **options)

    run = jax.jit(search)
    together, rows = run(memory_BV, own_BV, START), batch * beam
    cache_shapes = dict(history=(rows, length), length=(rows,), own=(rows, vocab))
    assert seen[-1] == ((batch, vocab), (rows,), cache_shapes)
    for i in range(batch):
        alone = run(*(x[i : i + 1] for x in (memory_BV, own_BV, START)))
        np.testing.assert_array_equal(together.tokens[i], alone.tokens[0])
        np.testing.assert_allclose(together.score[i], alone.score[0], **CLOSE)


CONFIG = dict(vocab_size=11, d_model=12, d_ff=17, num_layers=1, num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize("model_type", [EncoderDecoder, DecoderOnly])
def test_beam_of_one_is_greedy(model_type):
    """On real models, told when to end: beam search would go on behind an end in second place."""
    batch, length = 3, 6
    ends_B = jnp.array([3, length, length + 1])
    config = TransformerConfig(**CONFIG, head_dim=5, max_length=length, window=4)
    model = random_model(model_type, config)
    source_BS = jnp.asarray(np.random.default_rng(0).integers(3, 11, (batch, 5)))

    @functools.partial(jax.jit, static_argnums=0)
    def run(search):
        rest = () if model_type is DecoderOnly else (model.init_cross_cache(source_BS),)

        def step_fn(tokens_B, cache):
            is_end_B1 = (cache[0].length + 1 == ends_B)[:, None]
            logits_BV, cache = model.decode(tokens_B, cache, *rest)
            is_eos_1V = jnp.arange(config.vocab_size)[None] == EOS
            return jnp.where(is_end_B1 == is_eos_1V, logits_BV, -1e9), cache

        cache = model.init_cache(batch, length)
        return search(step_fn, cache, jnp.array([1, 4, 6]), max_new_tokens=length, eos_id=EOS)

    expected, actual = run(greedy), run(functools.partial(beam_search, beam_size=1))
    np.testing.assert_array_equal(expected.length, [3, 6, 6])
    assert len(np.unique(expected.tokens)) > 3
    np.testing.assert_array_equal(actual.tokens[:, 0], expected.tokens)
    np.testing.assert_array_equal(actual.length[:, 0], expected.length)
