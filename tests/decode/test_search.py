"""Greedy decoding, sampling and beam search over hand-made models.

B batch   V vocabulary   L max_new_tokens   b beam   R rows   D hidden
"""

import functools
import itertools
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.experimental import io_callback

from mqa_jax import DecoderOnly, EncoderDecoder, TransformerConfig, beam_search, greedy, sample
from mqa_jax.decode import logits
from mqa_jax.decode import search as search_module

EOS = 2
# Scores are sums of a few float32 log-probabilities.
CLOSE = dict(rtol=1e-5, atol=1e-5)
START = np.array([1, 4], np.int32)
seeds = st.integers(0, 2**31)


def property_test(max_examples):
    return settings(derandomize=True, deadline=None, max_examples=max_examples)


class Chain(NamedTuple):
    """A Markov chain; its logits hang on the position too."""

    logits_LVV: jax.Array

    def cache(self, batch):
        return {"position": jnp.zeros(batch, jnp.int32)}

    def step(self, tokens_R, cache):
        position_R = cache["position"]
        return self.logits_LVV[position_R, tokens_R], {"position": position_R + 1}


class Historian(NamedTuple):
    """Logits that hang on every token so far, which the cache keeps: a wrong reorder shows."""

    embed_LVD: jax.Array
    out_DV: jax.Array
    bias_V: jax.Array

    @classmethod
    def random(cls, seed, length, vocab_size, eos_bias=0.0):
        rng = np.random.default_rng(seed)
        embed, out = rng.normal(size=(length, vocab_size, 5)), rng.normal(size=(5, vocab_size))
        bias = eos_bias * np.eye(vocab_size)[EOS % vocab_size]
        return cls(*(jnp.asarray(x, jnp.float32) for x in (embed, out, bias)))

    def cache(self, batch):
        history_BL = jnp.zeros((batch, self.embed_LVD.shape[0]), jnp.int32)
        return {"history": history_BL, "length": jnp.zeros(batch, jnp.int32)}

    def step(self, tokens_R, cache):
        (rows, length), at_R = cache["history"].shape, cache["length"]
        history_RL = cache["history"].at[jnp.arange(rows), at_R].set(tokens_R)
        x_RLD = self.embed_LVD[jnp.arange(length)[None], history_RL]
        is_past_RL = jnp.arange(length)[None] <= at_R[:, None]
        x_RD = jnp.sum(jnp.where(is_past_RL[..., None], x_RLD, 0.0), axis=1)
        logits_RV = jnp.tanh(x_RD) @ self.out_DV + self.bias_V[None]
        return logits_RV, {"history": history_RL, "length": at_R + 1}

    def log_prob(self, history):
        """The same for one history, in float64."""
        embed, out, bias = (np.asarray(x, np.float64) for x in self)
        logits = np.tanh(sum(embed[i, token] for i, token in enumerate(history))) @ out + bias
        return logits - np.log(np.sum(np.exp(logits)))


@functools.cache
def compiled(search, **options):
    def run(model, tokens_B, **arrays):
        cache = model.cache(tokens_B.shape[0])
        return search(model.step, cache, tokens_B, **options, **arrays)

    return jax.jit(run)


def decode(search, model, tokens, *, key=None, **options):
    """`search` under `jax.jit`, compiled once for all models of like shape; results in NumPy."""
    arrays = {} if key is None else {"key": key}
    return jax.device_get(compiled(search, **options)(model, jnp.asarray(tokens), **arrays))


SEARCHES = {
    "greedy": greedy,
    "sample": functools.partial(sample, key=jax.random.key(0)),
    "beam_search": functools.partial(beam_search, beam_size=3),
}


# Greedy


def successors(vocab_size, follows, length):
    logits_VV = np.random.default_rng(0).normal(size=(vocab_size, vocab_size))
    for token, successor in follows.items():
        logits_VV[token, successor] = 9.0
    return Chain(jnp.asarray(np.broadcast_to(logits_VV, (length, *logits_VV.shape)), jnp.float32))


FOLLOWS = {0: 6, 1: 3, 2: 4, 3: 5, 4: 2, 5: 2, 6: 0}


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize(
    "start, eos, tokens, lengths, steps",
    [
        ([1, 4, 6], EOS, ["352", "2", "06060"], [3, 1, 5], 5),
        ([1, 4], EOS, ["352", "2"], [3, 1], 3),
        ([4, 4, 4, 4], EOS, ["2", "2", "2", "2"], [1] * 4, 1),
        ([1, 4], None, ["35242", "24242"], [5, 5], 5),
        ([3], EOS, ["52"], [2], 2),
    ],
)
def test_greedy_by_hand(start, eos, tokens, lengths, steps, pad):
    model = successors(7, FOLLOWS, length=5)
    decoded = decode(greedy, model, start, max_new_tokens=5, eos_id=eos, pad_id=pad)
    np.testing.assert_array_equal(decoded.tokens, [list(map(int, f"{t:{pad}<5}")) for t in tokens])
    np.testing.assert_array_equal(decoded.length, lengths)
    assert decoded.steps == steps
    assert decoded.score is None
    assert decoded.tokens.dtype == decoded.length.dtype == decoded.steps.dtype == np.int32


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_the_model_is_asked_until_all_rows_have_ended(search):
    model, asked = Historian.random(0, 9, 7, eos_bias=3.0), []

    def step_fn(tokens_R, cache):
        io_callback(lambda tokens: asked.append(tokens.size), None, tokens_R, ordered=True)
        return model.step(tokens_R, cache)

    options = dict(max_new_tokens=9, eos_id=EOS)
    decoded = jax.jit(lambda tokens: search(step_fn, model.cache(2), tokens, **options))(START)
    jax.effects_barrier()
    assert asked == [decoded.length.size] * int(decoded.steps)
    assert max(decoded.length.flatten().tolist()) <= decoded.steps < 9


# Sampling


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sample_follows_the_distribution(temperature):
    vocab, count = 5, 20_000
    logits_LVV = np.random.default_rng(3).normal(size=(2, vocab, vocab)).astype(np.float32)
    options = dict(max_new_tokens=2, temperature=temperature)
    start = np.full(count, 3)
    decoded = decode(
        sample, Chain(jnp.asarray(logits_LVV)), start, key=jax.random.key(5), **options
    )
    np.testing.assert_array_equal(decoded.length, np.full(count, 2))

    weights = np.exp(logits_LVV.astype(np.float64) / temperature)
    weights /= weights.sum(-1, keepdims=True)
    expected = count * weights[0, 3][:, None] * weights[1]
    observed = np.zeros((vocab, vocab))
    np.add.at(observed, tuple(decoded.tokens.T), 1)
    # Chi-square of 24 degrees of freedom: 24 on average, above 60 once in 16,000 draws of a key.
    assert np.sum((observed - expected) ** 2 / expected) < 60


@pytest.mark.parametrize(
    "options, support",
    [
        ({}, {0, 1, 2, 3}),
        (dict(top_k=1), {1}),
        (dict(top_k=3), {1, 2, 3}),
        (dict(top_p=1e-6), {1}),
        (dict(top_p=0.41), {1, 3}),
        (dict(top_p=1.0), {0, 1, 2, 3}),
        (dict(top_k=2, top_p=0.5), {1}),  # 4/7 of what top_k leaves.
        (dict(temperature=4.0, top_p=0.51), {1, 3}),  # 0.29, 0.27, ...
        (dict(temperature=0.2, top_p=0.75), {1}),  # 0.79, 0.19, ...
    ],
)
def test_sample_draws_the_right_tokens_only(options, support):
    probability, count = np.array([0.1, 0.4, 0.2, 0.3]), 4_000
    logits_V = np.log(probability.astype(np.float32))
    model = Chain(jnp.asarray(np.broadcast_to(logits_V, (1, 4, 4))))
    key, start = jax.random.key(1), np.zeros(count, int)
    drawn = decode(sample, model, start, key=key, max_new_tokens=1, **options).tokens[:, 0]
    assert set(drawn.tolist()) == support
    expected = probability ** (1 / options.get("temperature", 1.0)) * np.isin(range(4), [*support])
    frequencies = np.bincount(drawn, minlength=4) / count
    # Four standard deviations of a share of one half.
    np.testing.assert_allclose(frequencies, expected / expected.sum(), rtol=0, atol=0.032)


@given(
    st.lists(st.integers(-9, 9), min_size=1, max_size=9),
    st.none() | st.integers(1, 11),
    st.none() | st.floats(1e-6, 0.999),
)
@property_test(60)
def test_top_k_and_top_p_keep_the_right_support(logits, top_k, top_p):
    kept = np.array(logits, np.float64)
    if top_k is not None:
        kept[kept < np.sort(kept)[::-1][: len(kept)][min(top_k, len(kept)) - 1]] = -np.inf
    if top_p is not None:
        probability = np.exp(kept) / np.exp(kept).sum()
        above = np.array([probability[kept > x].sum() for x in kept])
        assume(np.all(np.abs(above - top_p) > 1e-5))  # Else rounding decides.
        kept[above >= top_p] = -np.inf
    logits_BV = jnp.array([logits, logits[::-1]], jnp.float32)
    actual = logits.keep_probable(logits_BV, top_k, top_p)
    np.testing.assert_array_equal(actual, [kept, kept[::-1]])


def test_top_p_of_one_leaves_nothing_out():
    # In float32 the first two of these add up to one: the cumulated sum says nothing of the rest.
    logits_BV = jnp.array([[-1.0, 0.0, -20.0, -25.0]])
    np.testing.assert_array_equal(logits.keep_probable(logits_BV, None, 1.0), logits_BV)


def test_sample_is_reproducible():
    model, options = Historian.random(0, length=8, vocab_size=7), dict(max_new_tokens=8)
    draw = [decode(sample, model, [1, 4, 4], key=jax.random.key(i), **options) for i in (0, 0, 1)]
    np.testing.assert_array_equal(draw[0].tokens, draw[1].tokens)
    assert np.all(np.any(draw[0].tokens != draw[2].tokens, axis=1))
    # Two rows that begin alike have draws of their own.
    assert np.any(draw[0].tokens[1] != draw[0].tokens[2])


def test_rows_with_keys_of_their_own_do_not_depend_on_each_other():
    model = Historian.random(0, length=8, vocab_size=7, eos_bias=1.0)
    draw = functools.partial(decode, sample, model, max_new_tokens=8, eos_id=EOS)
    keys, start = jax.random.split(jax.random.key(7), 5), np.array([1, 4, 6, 1, 1])
    together = draw(start, key=keys)
    assert len(set(together.length.tolist())) > 1
    for rows in ([3], [1, 0, 3], [4, 3, 2, 1, 0]):
        apart = draw(start[rows], key=keys[np.array(rows)])
        np.testing.assert_array_equal(apart.tokens, together.tokens[rows])
        np.testing.assert_array_equal(apart.length, together.length[rows])


# Beam search


def penalty(length, alpha):
    return ((5 + length) / 6) ** alpha


def reference_beam_search(model, start, beam_size, length, alpha):
    """The same algorithm on lists, without an early stop; and the step it could have stopped at."""
    live, finished, stop = [(0.0, (start,))], [], None
    for step in range(1, length + 1):
        candidates = [
            (score + log_prob, (*history, token))
            for score, history in live
            for token, log_prob in enumerate(model.log_prob(history))
        ]
        best = sorted(candidates, reverse=True)[: 2 * beam_size]
        ended = [(score / penalty(step, alpha), h) for score, h in best if h[-1] == EOS]
        finished = sorted(finished + ended, reverse=True)[:beam_size]
        live = [(score, h) for score, h in best if h[-1] != EOS][:beam_size]
        is_over = len(finished) == beam_size and (
            not live or live[0][0] / penalty(length, alpha) <= finished[-1][0]
        )
        stop = stop or (step if is_over or step == length else None)
    live = [(score / penalty(length, alpha), h) for score, h in live]
    return (finished + live)[:beam_size], stop


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


@pytest.mark.parametrize("beam, alpha", [(1, 0.6), (2, 1.0), (3, 0.0), (4, 0.6)])
@given(seed=seeds, eos_bias=st.sampled_from([-2.0, 0.0, 2.0]))
@property_test(25)
def test_a_narrow_beam_is_the_reference_and_stops_when_it_can(beam, alpha, seed, eos_bias):
    vocab, length, start = 7, 6, [1, 4]
    model = Historian.random(seed, length, vocab, eos_bias)
    options = dict(beam_size=beam, max_new_tokens=length, eos_id=EOS, alpha=alpha)
    decoded = decode(beam_search, model, start, **options)
    stops = []
    for row, token in enumerate(start):
        expected, stop = reference_beam_search(model, token, beam, length, alpha)
        check_hypotheses(decoded, row, expected)
        stops.append(stop)
    assert decoded.steps == max(stops)


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


def random_model(model_type, config):
    """Weights from NumPy, since JAX would compile for every shape of them."""
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model_type(config, rngs=nnx.Rngs(0))))
    weights = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state)
    return nnx.merge(graphdef, weights)


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


# Arguments


@pytest.mark.parametrize(
    "name, options, message",
    [
        *((name, dict(max_new_tokens=0), "at least 1, not 0") for name in SEARCHES),
        *((name, dict(eos_id=7), "eos_id=7 .* 7 tokens") for name in SEARCHES),
        *((name, dict(eos_id=-1), "eos_id=-1 .* 7 tokens") for name in SEARCHES),
        ("sample", dict(temperature=0.0), "temperature must be above 0, not 0.0: .* greedy"),
        ("sample", dict(temperature=-0.5), "above 0, not -0.5"),
        ("sample", dict(temperature=float("nan")), "above 0, not nan"),
        ("sample", dict(top_k=0), "top_k must be at least 1, not 0"),
        ("sample", dict(top_p=0.0), r"top_p must be in \(0, 1\], not 0.0"),
        ("sample", dict(top_p=1.01), r"top_p must be in \(0, 1\], not 1.01"),
        ("sample", dict(top_p=float("nan")), r"top_p must be in \(0, 1\], not nan"),
        ("beam_search", dict(beam_size=0), "beam_size must be at least 1, not 0"),
        ("beam_search", dict(alpha=-0.25), "alpha must be at least 0, not -0.25"),
        ("beam_search", dict(alpha=float("nan")), "alpha must be at least 0, not nan"),
    ],
)
def test_arguments_that_make_no_sense(name, options, message):
    model = Historian.random(0, 5, 7)
    options = dict(max_new_tokens=5, eos_id=EOS) | options
    with pytest.raises(ValueError, match=message):
        SEARCHES[name](model.step, model.cache(3), jnp.zeros(3, jnp.int32), **options)


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_shapes_that_do_not_fit(search):
    model, options = Historian.random(0, 5, 7), dict(max_new_tokens=5, eos_id=EOS)
    tokens_B, cache = jnp.zeros(3, jnp.int32), model.cache(3)
    with pytest.raises(ValueError, match=r"cache\['length'\] has shape \[2\], .* 3 rows"):
        search(model.step, cache | {"length": jnp.zeros(2, jnp.int32)}, tokens_B, **options)
    with pytest.raises(ValueError, match=r"cache\['deep'\]\[1\] has shape \[\], .* 3 rows"):
        search(model.step, cache | {"deep": (tokens_B, jnp.int32(0))}, tokens_B, **options)
    with pytest.raises(ValueError, match=r"shape \[B\], not \[3, 1\]"):
        search(model.step, cache, tokens_B[:, None], **options)
    with pytest.raises(ValueError, match=r"logits \[3, V\], not \[3\]"):
        search(lambda tokens, cache: (tokens, cache), cache, tokens_B, **options)
    with pytest.raises(ValueError, match=r"logits \[3, V\], not \[4, 7\]"):
        search(lambda tokens, cache: (jnp.zeros((4, 7)), cache), cache, tokens_B, **options)


def test_as_many_keys_as_rows():
    model, keys = Historian.random(0, 5, 7), jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match=r"\b2\b[\s\S]*\b3\b|\b3\b[\s\S]*\b2\b"):
        sample(model.step, model.cache(3), jnp.zeros(3, jnp.int32), key=keys, max_new_tokens=2)


def test_the_example_in_the_docstring():
    _, _, code = search_module.__doc__.partition("    @jax.jit")
    code = textwrap.dedent("    @jax.jit" + code.partition("\n\nArray letters")[0])
    model = successors(7, FOLLOWS, length=32)
    names = dict(jax=jax, greedy=greedy, my_model=Chain.step)
    exec(code, names)
    # What it calls `params` is the model itself here; 32 tokens at most, the end is 2.
    tokens_BL = names["continue_prompt"](model, jnp.array([1, 6]), model.cache(2))
    assert tokens_BL.shape == (2, 32)
    np.testing.assert_array_equal(tokens_BL[0, :4], [3, 5, 2, 0])
    np.testing.assert_array_equal(tokens_BL[1, :4], [0, 6, 0, 6])
