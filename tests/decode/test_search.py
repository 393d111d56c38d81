"""Greedy decoding and sampling over hand-made models, and what all searches are asked.

B batch   V vocabulary   L max_new_tokens   R rows
"""

import functools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import io_callback
from toy_models import (
    EOS,
    FOLLOWS,
    SEARCHES,
    START,
    Chain,
    Historian,
    decode,
    property_test,
    random_model,
    seeds,
    successors,
)

from mqa_jax import DecoderOnly, TransformerConfig, beam_search, greedy, sample
from mqa_jax.decode import search as search_module

# Greedy


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


def test_numbers_that_are_traced_and_one_a_row():
    """One compiled program serves all temperatures; what is out of range draws nothing."""
    model, key = Historian.random(0, length=6, vocab_size=7), jax.random.key(3)
    tokens_B = jnp.array([1, 4, 4])

    @jax.jit
    def draw(temperature, top_p):
        options = dict(max_new_tokens=6, temperature=temperature, top_p=top_p)
        return sample(model.step, model.cache(3), tokens_B, key=key, **options)

    temperatures, shares = np.array([0.3, 3.0, 1e-30]), np.array([1.0, 0.6, 0.9])
    together = draw(*(x.astype(np.float32) for x in (temperatures, shares)))
    assert np.all(together.is_finite)
    for row, numbers in enumerate(zip(temperatures, shares, strict=True)):
        options = dict(zip(["temperature", "top_p"], map(float, numbers), strict=True))
        alone = decode(sample, model, tokens_B, key=key, max_new_tokens=6, **options)
        np.testing.assert_array_equal(alone.tokens[row], together.tokens[row])
        np.testing.assert_array_equal(draw(*map(jnp.float32, numbers)).tokens, alone.tokens)
    for number in (-1.0, 0.0, np.nan, np.inf):
        legal = number == np.inf
        assert np.all(draw(jnp.float32(number), jnp.float32(0.6)).is_finite == legal)
        nothing = draw(jnp.float32(0.6), jnp.array([0.5, number, 0.5], jnp.float32))
        np.testing.assert_array_equal(nothing.is_finite, [True, False, True])
        np.testing.assert_array_equal(nothing.length, [6, 0, 6])
        assert not np.any(nothing.tokens[1])


def test_an_alpha_that_is_traced():
    model, tokens_B = Historian.random(0, length=6, vocab_size=7), jnp.array([1, 4])

    @jax.jit
    def run(alpha):
        options = dict(beam_size=2, max_new_tokens=6, eos_id=EOS, alpha=alpha)
        return beam_search(model.step, model.cache(2), tokens_B, **options)

    for alpha in (0.0, 1.5):
        expected = decode(
            beam_search, model, tokens_B, beam_size=2, max_new_tokens=6, eos_id=EOS, alpha=alpha
        )
        np.testing.assert_array_equal(run(alpha).tokens, expected.tokens)
        assert np.all(expected.is_finite)
    for alpha in (np.nan, -0.5, np.inf, 1e4):
        decoded = run(alpha)
        assert not np.any(decoded.is_finite) and not np.any(decoded.length) and decoded.steps == 0
    with pytest.raises(ValueError, match="alpha must be one number"):
        run(jnp.ones(2))


@pytest.mark.parametrize("name", SEARCHES)
def test_integers_may_be_arrays_of_jax(name):
    model, start = Historian.random(0, 5, 7), jnp.array([1, 4])
    numbers = dict(max_new_tokens=4, pad_id=3) | ({"beam_size": 2} if name == "beam_search" else {})

    def run(**numbers):
        return SEARCHES[name](model.step, model.cache(2), start, eos_id=EOS, **numbers).tokens

    expected = run(**numbers)
    arrays = {option: jnp.int32(number) for option, number in numbers.items()}
    np.testing.assert_array_equal(run(**arrays), expected)
    np.testing.assert_array_equal(jax.jit(lambda: run(**arrays))(), expected)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_wide_id_does_not_wrap_around_into_the_vocabulary(name):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        config = TransformerConfig(
            vocab_size=11,
            d_model=8,
            d_ff=13,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            head_dim=5,
            max_length=6,
        )
        model = random_model(DecoderOnly, config)

        @jax.jit
        def run(start):
            return SEARCHES[name](model.decode, model.init_cache(2, 3), start, max_new_tokens=3)

        decoded = run(jnp.array([4, 2**32 + 4]))
        np.testing.assert_array_equal(decoded.is_finite, [True, False])


def test_keys_of_both_kinds():
    model, options = Historian.random(0, 5, 7), dict(max_new_tokens=5)
    new, old = jax.random.key(3), jax.random.PRNGKey(3)
    draw = functools.partial(decode, sample, model, [1, 4], **options)
    np.testing.assert_array_equal(draw(key=new).tokens, draw(key=old).tokens)
    apart = [draw(key=jax.random.split(key)).tokens for key in (new, old)]
    np.testing.assert_array_equal(*apart)
    for wrong in (0, jnp.int32(0), jnp.zeros(3, jnp.uint32), jnp.zeros((2, 2))):
        with pytest.raises(ValueError, match="made by jax.random.key"):
            sample(model.step, model.cache(2), jnp.zeros(2, jnp.int32), key=wrong, **options)


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


# What is no number


def plain_search(model, start, length, ends, noise_LV=None):
    """In float64, one token at a time: the most probable ones, or with Gumbel's noise a sample."""
    history = [start]
    for step in range(length):
        log_prob_V = model.log_prob(history)
        if np.any(np.isnan(log_prob_V)):
            return history[1:], False
        noise_V = 0 if noise_LV is None else noise_LV[step]
        history.append(int(np.argmax(log_prob_V / 0.7 + noise_V)))
        if history[-1] in ends:
            break
    return history[1:], True


@pytest.mark.parametrize("ends", [(), (EOS,), (EOS, 5)])
@given(
    seed=seeds,
    holes=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=4),
    is_sampled=st.booleans(),
)
@property_test(30)
def test_searches_are_plain_loops(ends, seed, holes, is_sampled):
    """Holes: a token at a position makes NaN of all that follows, as where a cache overflows."""
    length, vocab = 6, 7
    model, eos_id = Historian.random(seed, length, vocab, holes=holes), ends or None
    options, noise_BLV = dict(max_new_tokens=length, eos_id=eos_id), [None, None]
    if is_sampled:
        keys_B = jax.random.split(jax.random.key(seed), 2)
        steps_L = jnp.arange(length)
        keys_BL = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys_B, steps_L)
        noise_BLV = np.array(jax.vmap(jax.vmap(lambda k: jax.random.gumbel(k, (vocab,))))(keys_BL))
        decoded = decode(sample, model, START, key=keys_B, temperature=0.7, **options)
    else:
        decoded = decode(greedy, model, START, **options)
    for row, token in enumerate(START.tolist()):
        expected, is_finite = plain_search(model, token, length, ends, noise_BLV[row])
        padded = expected + [0] * (length - len(expected))
        np.testing.assert_array_equal(decoded.tokens[row], padded)
        assert decoded.length[row] == len(expected)
        assert decoded.is_finite[row] == is_finite


# Arguments


@pytest.mark.parametrize(
    "name, options, message",
    [
        *(
            (name, {option: value}, message)
            for name in SEARCHES
            for option, value, message in [
                ("max_new_tokens", 0, "at least 1, not 0"),
                ("max_new_tokens", 2.0, r"must be an integer, not 2\.0"),
                ("max_new_tokens", True, "must be an integer, not True"),
                ("eos_id", 7, "eos_id=7 .* 7 tokens"),
                ("eos_id", -1, "eos_id=-1 .* 7 tokens"),
                ("eos_id", (2, 7), "eos_id=7 .* 7 tokens"),
                ("eos_id", np.array([2.0]), r"eos_id must be an integer, not 2\.0"),
                ("eos_id", False, "eos_id must be an integer, not False"),
                ("eos_id", "2", "eos_id must be an integer, not '2'"),
                ("eos_id", (), r"one integer or several, or None, not \(\)"),
                ("eos_id", ((2, 3),), "one integer or several"),
                ("pad_id", -1, "pad_id=-1 .* 7 tokens"),
                ("pad_id", 7, "pad_id=7 .* 7 tokens"),
                ("pad_id", None, "pad_id must be an integer, not None"),
            ]
        ),
        ("sample", dict(temperature=0.0), "temperature must be .* above 0, not 0.0: .* greedy"),
        ("sample", dict(temperature=-0.5), "above 0, not -0.5"),
        ("sample", dict(temperature=float("nan")), "above 0, not nan"),
        ("sample", dict(temperature=float("inf")), "finite number, above 0, not inf"),
        ("sample", dict(temperature="1"), "finite number, above 0, not '1'"),
        ("sample", dict(temperature=True), "finite number, above 0, not True"),
        ("sample", dict(temperature=None), "finite number, above 0, not None"),
        ("sample", dict(temperature=10**400), "finite number, above 0, not 1000"),
        ("sample", dict(temperature=np.array([1.0, 2.0])), r"one a row, \[3\]: not \[2\] of them"),
        ("sample", dict(temperature=np.array([1.0, 0.0, 2.0])), "above 0, not 0.0: .* greedy"),
        ("sample", dict(top_k=0), "top_k must be at least 1, not 0"),
        ("sample", dict(top_k=2.0), r"top_k must be an integer, not 2\.0"),
        ("sample", dict(top_p=0.0), "top_p must be .*, above 0, at most 1, not 0.0"),
        ("sample", dict(top_p=1.01), "top_p must be .*, at most 1, not 1.01"),
        ("sample", dict(top_p=float("nan")), "top_p must be .*, at most 1, not nan"),
        ("sample", dict(top_p=np.array([True] * 3)), "top_p must be .*, at most 1, not True"),
        ("beam_search", dict(beam_size=0), "beam_size must be at least 1, not 0"),
        ("beam_search", dict(beam_size=1.5), r"beam_size must be an integer, not 1\.5"),
        ("beam_search", dict(alpha=-0.25), "alpha must be .* at least 0, not -0.25"),
        ("beam_search", dict(alpha=float("nan")), "alpha must be .* at least 0, not nan"),
        ("beam_search", dict(alpha=float("inf")), "alpha must be .* at least 0, not inf"),
        ("beam_search", dict(alpha="1"), "alpha must be .* at least 0, not '1'"),
        ("beam_search", dict(alpha=1e6), "alpha=1000000.0 makes length penalties"),
    ],
)
def test_arguments_that_make_no_sense(name, options, message):
    model = Historian.random(0, 5, 7)
    options = dict(max_new_tokens=5, eos_id=EOS) | options
    with pytest.raises(ValueError, match=message):
        SEARCHES[name](model.step, model.cache(3), jnp.zeros(3, jnp.int32), **options)


@pytest.mark.parametrize("name", SEARCHES)
def test_ids_of_several_kinds_that_end_a_row(name):
    """Several, in any order, and traced; padding that is one of them is told by the length."""
    model = Historian.random(3, 9, 7)

    def run(eos_id, pad_id=0):
        options = dict(max_new_tokens=9, eos_id=eos_id, pad_id=pad_id)
        return SEARCHES[name](model.step, model.cache(2), jnp.array(START), **options)

    expected = run((EOS, 1))
    assert np.any(expected.length < 9)
    alike = [(1, EOS, 1), np.array([1, EOS])]
    traced = [jax.jit(run)(jnp.array([1, EOS])), jax.jit(lambda x: run([x, 1]))(EOS)]
    for decoded in [*map(run, alike), *traced]:
        np.testing.assert_array_equal(decoded.tokens, expected.tokens)
        np.testing.assert_array_equal(decoded.length, expected.length)
    padded = run((EOS, 1), pad_id=EOS)
    np.testing.assert_array_equal(padded.length, expected.length)
    is_padding = np.arange(9) >= np.asarray(expected.length)[..., None]
    np.testing.assert_array_equal(padded.tokens, np.where(is_padding, EOS, expected.tokens))


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_tokens_to_begin_with(search):
    model, options = Historian.random(0, 5, 7), dict(max_new_tokens=5, eos_id=EOS)
    for tokens, message in [
        (jnp.array([1, 7, 2]), r"tokens_B\[1\]=7 is not in the vocabulary of 7"),
        (np.array([1, 2, -1]), r"tokens_B\[2\]=-1 is not in the vocabulary of 7"),
        (np.array([1, 2, 2**40]), r"tokens_B\[2\]=1099511627776 is not in"),
        (jnp.array([1.0, 2.0, 3.0]), "must be integers, not float32"),
        (jnp.array([True, True, True]), "must be integers, not bool"),
        ([1, 2, 3], r"must be an array of shape \[B\], not \[1, 2, 3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            search(model.step, model.cache(3), tokens, **options)


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
    with pytest.raises(ValueError, match=r"one a row, \[3\]: not \[2\] of them"):
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
