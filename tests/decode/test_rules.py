"""Rules on logits, against loops over one row, and under every search.

B batch   V vocabulary   L max_new_tokens   P prompt length   R rows   H history
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_models import CLOSE, EOS, SEARCHES, START, Chain, Historian, decode, property_test, seeds

from mqa_jax import beam_search, greedy, sample
from mqa_jax.decode.history import History
from mqa_jax.decode.rules import (
    Forbid,
    ForceFirst,
    ForceLast,
    MinNewTokens,
    MinP,
    NoRepeatNgram,
    Normalize,
    PresencePenalty,
    RepetitionPenalty,
    Temperature,
    TopK,
    TopP,
)

VOCAB = 7
INF = np.inf


def softmax(logits):
    weights = np.exp(logits - np.max(logits))
    return weights / np.sum(weights)


# Each rule beside what it makes of one row: `logits` `[V]`, all tokens, the new ones, what is left.


def repetition(logits, tokens, new, left, penalty):
    for token in {*tokens}:
        logits[token] *= penalty if logits[token] < 0 else 1 / penalty


def presence(logits, tokens, new, left, penalty):
    for token in {*new}:
        logits[token] -= penalty


def ngram(logits, tokens, new, left, size):
    for i in range(len(tokens) - size + 1):
        if tokens[i : i + size - 1] == tokens[len(tokens) - size + 1 :]:
            logits[tokens[i + size - 1]] = -INF


def forbid(logits, tokens, new, left, phrases):
    for *first, last in phrases:
        if not first or tokens[-len(first) :] == first:
            logits[last] = -INF


def at_least(logits, tokens, new, left, count):
    if len(new) < count:
        logits[[EOS, 4]] = -INF


def first(logits, tokens, new, left, token):
    if len(tokens) == 1:
        logits[:], logits[token] = -INF, 0


def last(logits, tokens, new, left, ids):
    if left == 1:
        logits[:], logits[ids] = -INF, 0


def temperature(logits, tokens, new, left, value):
    logits /= value


def top_k(logits, tokens, new, left, count):
    logits[np.argsort(-logits, kind="stable")[count:]] = -INF


def top_p(logits, tokens, new, left, mass):
    order = np.argsort(-logits, kind="stable")
    before = np.cumsum(softmax(logits)[order]) - softmax(logits)[order]
    logits[order[before >= mass]] = -INF


def min_p(logits, tokens, new, left, share):
    probability = softmax(logits)
    logits[probability < share * max(probability)] = -INF


def normalize(logits, tokens, new, left):
    logits[:] = np.log(softmax(logits))


RULES = {
    "repetition": (RepetitionPenalty(1.5), functools.partial(repetition, penalty=1.5)),
    "encouraged": (RepetitionPenalty(0.5), functools.partial(repetition, penalty=0.5)),
    "presence": (PresencePenalty(0.7), functools.partial(presence, penalty=0.7)),
    "once": (NoRepeatNgram(1), functools.partial(ngram, size=1)),
    "bigrams": (NoRepeatNgram(2), functools.partial(ngram, size=2)),
    "trigrams": (NoRepeatNgram(3), functools.partial(ngram, size=3)),
    "more than there are": (NoRepeatNgram(30), lambda *_: None),
    "forbidden": (Forbid([3, 0]), functools.partial(forbid, phrases=[[3], [0]])),
    "phrases": (
        Forbid([[3, 4], 0, (5, 1, 6), np.array([1, 1])]),
        functools.partial(forbid, phrases=[[3, 4], [0], [5, 1, 6], [1, 1]]),
    ),
    "at least": (MinNewTokens(3, (EOS, 4)), functools.partial(at_least, count=3)),
    "first": (ForceFirst(5), functools.partial(first, token=5)),
    "last": (ForceLast((EOS, 3)), functools.partial(last, ids=[EOS, 3])),
    "temperature": (Temperature(0.6), functools.partial(temperature, value=0.6)),
    "top_k": (TopK(3), functools.partial(top_k, count=3)),
    "top_p": (TopP(0.6), functools.partial(top_p, mass=0.6)),
    "min_p": (MinP(0.3), functools.partial(min_p, share=0.3)),
    "normalize": (Normalize(), normalize),
}


@functools.cache
def compiled_rule(name):
    rule, _ = RULES[name]
    return jax.jit(rule)


@pytest.mark.parametrize("name", RULES)
@given(
    seed=seeds,
    prompts=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=3, max_size=3),
    step=st.integers(0, 5),
)
@property_test(40)
def test_each_rule_by_itself(name, seed, prompts, step):
    """On rows with prompts of several lengths, of which the search has decoded the same number."""
    rng, width, limit = np.random.default_rng(seed), 5, 6
    logits_RV = rng.normal(scale=2, size=(3, VOCAB)).astype(np.float32)
    # What is no token is of a row that is otherwise full of them.
    tokens_RH = rng.integers(0, VOCAB, (3, width + limit)).astype(np.int32)
    start_R = np.array([width - len(prompt) for prompt in prompts], np.int32)
    for row, prompt in enumerate(prompts):
        tokens_RH[row, start_R[row] : width] = prompt
    history = History(tokens_RH, start_R, np.int32(width + step), np.int32(step), limit)
    actual_RV = compiled_rule(name)(logits_RV, history)
    for row, prompt in enumerate(prompts):
        new = tokens_RH[row, width : width + step].tolist()
        expected_V = logits_RV[row].astype(np.float64)
        RULES[name][1](expected_V, prompt + new, new, limit - step)
        np.testing.assert_allclose(actual_RV[row], expected_V, **CLOSE)


# Two at a time, whose order makes a difference.
PAIRS = [
    ("repetition", "bigrams"),
    ("phrases", "last"),
    ("at least", "presence"),
    ("once", "first"),
]
PROMPTS = [[6, 1], [0, 3, 5, 4]]


def prompt_arrays():
    tokens_BP = np.zeros((2, 5), np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens_BP[row, : len(prompt)] = prompt
    return jnp.asarray(tokens_BP), jnp.array([len(prompt) for prompt in PROMPTS])


def greedy_by_hand(model, names, start, prompt, length):
    history, new = [start], []
    while len(new) < length and EOS not in new:
        logits = model.log_prob(history)
        for name in names:
            RULES[name][1](logits, prompt + new, new, length - len(new))
        new.append(int(np.argmax(logits)))
        history.append(new[-1])
    return new


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("with_prompt", [False, True])
def test_greedy_asks_its_rules(names, with_prompt):
    """In their order, of the tokens that the search began with or of a whole prompt."""
    length, changed = 6, 0
    # Log-probabilities, since the sign of a logit decides what a penalty does.
    rules = (Normalize(), *(RULES[name][0] for name in names))
    prompts = PROMPTS if with_prompt else [[int(token)] for token in START]

    @jax.jit
    def run(model, prompt):
        options = dict(max_new_tokens=length, eos_id=EOS, rules=rules, prompt=prompt)
        return greedy(model.step, model.cache(2), START, **options)

    for seed in range(8):
        model = Historian.random(seed, length, VOCAB, -1.0)
        decoded = run(model, prompt_arrays() if with_prompt else None)
        plain = decode(greedy, model, START, max_new_tokens=length, eos_id=EOS)
        for row, prompt in enumerate(prompts):
            expected = greedy_by_hand(model, names, int(START[row]), prompt, length)
            actual = decoded.tokens[row, : decoded.length[row]].tolist()
            assert actual == expected
            changed += plain.tokens[row, : plain.length[row]].tolist() != expected
    assert changed > 4, "rules that change nothing would not be missed"


@pytest.mark.parametrize("name", SEARCHES)
def test_no_search_repeats_what_it_must_not(name):
    """Hypotheses have histories of their own, which move with them."""
    length, beams = 9, 0

    @jax.jit
    def run(model):
        options = dict(max_new_tokens=length, rules=[NoRepeatNgram(2)], prompt=prompt_arrays())
        return SEARCHES[name](model.step, model.cache(2), START, **options)

    for seed in range(6):
        decoded = run(Historian.random(seed, length, VOCAB, -4.0))
        tokens = np.asarray(decoded.tokens).reshape(2, -1, length)
        for row, prompt in enumerate(PROMPTS):
            for hypothesis in tokens[row]:
                text = [*prompt, *hypothesis.tolist()]
                pairs = list(zip(text, text[1:], strict=False))
                assert len({*pairs[len(prompt) - 1 :]} | {*pairs[: len(prompt) - 1]}) == len(pairs)
                beams += 1
    assert beams == 6 * (6 if name == "beam_search" else 2)


@pytest.mark.parametrize("name", SEARCHES)
def test_numbers_that_are_traced_and_one_a_row(name):
    length = 6
    model = Historian.random(1, length, VOCAB, 1.0)
    search = SEARCHES[name]
    if name == "sample":
        search = functools.partial(sample, key=jax.random.split(jax.random.key(0), 2))

    def rules(penalty, presence, count, share):
        return [
            RepetitionPenalty(penalty),
            PresencePenalty(presence),
            MinNewTokens(count, EOS),
            Temperature(penalty),
            TopP(share),
            MinP(share / 2),
        ]

    @jax.jit
    def run(numbers):
        options = dict(max_new_tokens=length, eos_id=EOS, rules=rules(*numbers))
        return search(model.step, model.cache(2), START, **options)

    together = run([jnp.array(x) for x in ([0.8, 1.6], [0.0, 0.5], [0, 4], [0.9, 0.5])])
    for row, numbers in enumerate([(0.8, 0.0, 0, 0.9), (1.6, 0.5, 4, 0.5)]):
        assert np.all(together.is_finite)
        alone = run([jnp.array(x) for x in numbers])
        np.testing.assert_array_equal(alone.tokens[row], together.tokens[row])
    options = dict(max_new_tokens=length, eos_id=EOS, rules=rules(*numbers))
    known = jax.jit(lambda: search(model.step, model.cache(2), START, **options))()
    np.testing.assert_array_equal(alone.tokens, known.tokens)
    for bad in [(-1.0, 0.0, 0, 0.9), (1.0, np.nan, 0, 0.9), (1.0, 0.0, 0, 1.5)]:
        # A row without a token yet has none to be penalized for its presence.
        least = int(np.isnan(bad[1]))
        decoded = run([jnp.array(x) for x in bad])
        assert not np.any(decoded.is_finite) and np.all(decoded.length <= least)


def test_min_p_of_sample_comes_last():
    probability = np.array([0.5, 0.2, 0.15, 0.1, 0.04, 0.01, 0.0])
    with np.errstate(divide="ignore"):
        logits_VV = np.broadcast_to(np.log(probability), (VOCAB, VOCAB)).astype(np.float32)
    model = Chain(jnp.asarray(logits_VV[None]))
    start = np.zeros(400, np.int32)

    def drawn(**options):
        key = jax.random.key(0)
        return {
            *decode(sample, model, start, key=key, max_new_tokens=1, **options)
            .tokens[:, 0]
            .tolist()
        }

    assert drawn(min_p=0.19) == {0, 1, 2, 3}
    # Flatter: 0.5 ** 0.5 and so on, of which the last is 0.14 of the first.
    assert drawn(min_p=0.19, temperature=2.0) == {0, 1, 2, 3, 4}
    assert drawn(min_p=0.19, top_k=2) == {0, 1}
    assert drawn(min_p=1.0) == {0}
    for bad in (0.0, 1.1, np.nan):
        with pytest.raises(ValueError, match="min_p must be .*above 0, at most 1, not"):
            drawn(min_p=bad)
    run = jax.jit(
        lambda p: sample(
            model.step, model.cache(2), START * 0, key=jax.random.key(0), max_new_tokens=1, min_p=p
        )
    )
    np.testing.assert_array_equal(run(jnp.array([0.5, 1.5])).is_finite, [True, False])


@pytest.mark.parametrize("name", SEARCHES)
def test_a_rule_of_ones_own(name):
    """Any function will do; it sees what has been chosen, and nothing of what has not."""

    def ascending(logits_RV, history):
        last_R1 = history.last(1)
        is_less_RV = jnp.arange(VOCAB)[None] <= last_R1
        return jnp.where(is_less_RV, -jnp.inf, logits_RV)

    model = Historian.random(0, 6, VOCAB)
    options = dict(max_new_tokens=6, rules=[ascending])
    decoded = SEARCHES[name](model.step, model.cache(2), START, **options)
    for row, start in enumerate(START):
        for tokens, length in zip(
            np.asarray(decoded.tokens[row]).reshape(-1, 6),
            np.atleast_1d(decoded.length[row]),
            strict=True,
        ):
            said = [start, *tokens[:length]]
            assert np.all(np.diff(said) > 0)
    if name != "beam_search":
        # Behind the last token of the vocabulary there is none: the row cannot go on.
        assert not np.any(decoded.is_finite) and np.all(decoded.length < 6)


@pytest.mark.parametrize("name", ["greedy", "sample"])
def test_a_rule_does_not_hide_what_is_no_number(name):
    logits_LVV = np.random.default_rng(0).normal(size=(4, 7, 7)).astype(np.float32)
    logits_LVV[0, 4, 5] = np.nan
    decoded = SEARCHES[name](
        Chain(jnp.asarray(logits_LVV)).step,
        Chain(jnp.asarray(logits_LVV)).cache(2),
        START,
        max_new_tokens=4,
        rules=[Forbid([5])],
    )
    np.testing.assert_array_equal(decoded.is_finite, [True, False])


@pytest.mark.parametrize("name", ["greedy", "sample"])
@given(seed=seeds, eos_bias=st.sampled_from([-1.0, 2.0]))
@property_test(10)
def test_a_score_for_each_token(name, seed, eos_bias):
    length, model = 6, Historian.random(seed, 6, VOCAB, eos_bias)
    key = jax.random.key(seed) if name == "sample" else None
    search = greedy if name == "greedy" else sample
    for options in (dict(), dict(rules=(RepetitionPenalty(1.5),))):
        options |= dict(max_new_tokens=length, eos_id=EOS)
        plain = decode(search, model, START, key=key, **options)
        assert plain.token_scores is None
        decoded = decode(search, model, START, key=key, token_scores=True, **options)
        np.testing.assert_array_equal(plain.tokens, decoded.tokens)
        for row, start in enumerate(START.tolist()):
            n = decoded.length[row]
            history = [start, *decoded.tokens[row, :n].tolist()]
            expected = [model.log_prob(history[:j])[history[j]] for j in range(1, n + 1)]
            expected += [0.0] * (length - n)
            np.testing.assert_allclose(decoded.token_scores[row], expected, **CLOSE)


@pytest.mark.parametrize("name", ["greedy", "sample"])
def test_a_decode_in_parts_is_the_decode(name):
    """Any number of steps at a time; the rules see all that came before."""
    length, rules = 7, [RepetitionPenalty(1.3)]

    @functools.partial(jax.jit, static_argnames="steps")
    def run(model, begun=None, steps=None):
        cache = model.cache(2) if begun is None else begun.cache
        options = dict(max_new_tokens=length, eos_id=EOS, pad_id=6, rules=rules, token_scores=True)
        return SEARCHES[name](model.step, cache, START, steps=steps, begun=begun, **options)

    for eos_bias in (-9.0, 0.5):
        model = Historian.random(2, length, VOCAB, eos_bias)
        whole = run(model)
        for steps in (1, 3, 9):
            decoded = run(model, steps=steps)
            taken = [int(decoded.steps)]
            for _ in range(length):
                decoded = run(model, decoded, steps)
                taken.append(int(decoded.steps))
            assert taken[:2] == np.minimum([steps, 2 * steps], whole.steps).tolist()
            jax.tree.map(np.testing.assert_array_equal, decoded, whole)
        # Any of several ends, the last token of a part too.
        ends = functools.partial(SEARCHES[name], model.step, eos_id=(EOS, 4), max_new_tokens=length)
        at_once = ends(model.cache(2), START)
        for steps in range(1, length):
            begun = ends(model.cache(2), START, steps=steps)
            decoded = ends(begun.cache, START, begun=begun)
            np.testing.assert_array_equal(decoded.tokens, at_once.tokens)
        # As many as there can be, behind some.
        jax.tree.map(
            np.testing.assert_array_equal, run(model, run(model, steps=3), 2**31 - 1), whole
        )
        if eos_bias < 0:
            # A row that the host has ended has ended.
            begun = dataclasses.replace(run(model, steps=3), length=jnp.array([1, 3]))
            ended = run(model, begun)
            np.testing.assert_array_equal(ended.length, [1, 7])
            np.testing.assert_array_equal(ended.tokens[1], whole.tokens[1])
            assert np.all(ended.tokens[0, 3:] == 6)


@pytest.mark.parametrize("name", SEARCHES)
def test_arguments_that_make_no_sense(name):
    model = Historian.random(0, 5, VOCAB)

    def run(**options):
        options = dict(max_new_tokens=5, eos_id=EOS) | options
        return SEARCHES[name](model.step, model.cache(2), jnp.zeros(2, jnp.int32), **options)

    for rules, message in [
        (TopK(2), r"rules must be a sequence of rules, not TopK\(count=2\)"),
        ("top_k", "rules must be a sequence of rules, not 'top_k'"),
        ([2], "functions of logits and history, not 2"),
        ([TopK], "functions of logits and history, not <class"),
        ([lambda logits, history: logits[:, 1:]], r"must return logits \[\d, 7\].*, not \[\d, 6\]"),
        ([RepetitionPenalty(0.0)], "RepetitionPenalty must be .* above 0, not 0.0"),
        (
            [RepetitionPenalty(1e39)],
            "must be a number of float32, which 1e.39 is too large",
        ),
        ([RepetitionPenalty([1.0, 0.0])], "RepetitionPenalty must be .* above 0, not 0.0"),
        ([RepetitionPenalty([1.0] * 3)], r"RepetitionPenalty .* one a row, \[2\]: not \[3\]"),
        ([PresencePenalty("1")], "PresencePenalty must be a finite number, not '1'"),
        ([NoRepeatNgram(0)], "NoRepeatNgram must be at least 1, not 0"),
        ([NoRepeatNgram(2.0)], "NoRepeatNgram must be an integer, not 2.0"),
        ([Forbid([])], r"Forbid needs ids, or sequences of them, not \(\)"),
        ([Forbid(3)], "Forbid needs ids, or sequences of them, not 3"),
        ([Forbid("3")], "Forbid needs ids, or sequences of them, not '3'"),
        ([Forbid([7])], "Forbid=7 is not in the vocabulary of 7"),
        ([Forbid([[3, -1]])], "Forbid=-1 is not in the vocabulary of 7"),
        ([Forbid([[]])], "a phrase has a token at least"),
        ([MinNewTokens(-1, EOS)], "MinNewTokens must be from 0 to 2147483647, not -1"),
        ([MinNewTokens(1.5, EOS)], "MinNewTokens must be an integer, not 1.5"),
        ([MinNewTokens([1] * 3, EOS)], r"MinNewTokens .* one a row, \[2\]: not \[3\]"),
        ([MinNewTokens(2, 7)], "eos_id=7 is not in the vocabulary of 7"),
        ([ForceFirst(7)], "ForceFirst=7 is not in the vocabulary of 7"),
        ([ForceLast(None)], "ForceLast needs the id of an end, not None"),
        ([ForceLast(9)], "9 is not in the vocabulary of 7"),
        ([Temperature(0)], "Temperature must be .* above 0, not 0: for 0, use greedy"),
        ([TopK(0)], "TopK must be at least 1, not 0"),
        ([TopP(1.5)], "TopP must be .* at most 1, not 1.5"),
        ([MinP(0)], "MinP must be .* above 0, at most 1, not 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(rules=rules)
    ids = jnp.ones((2, 3), jnp.int32)
    for prompt, message in [
        ((ids[:1], jnp.array([1, 1])), r"must be tokens \[2, P\] and lengths \[2\], not"),
        ((ids[:, :0], jnp.array([1, 1])), r"must be tokens \[2, P\]"),
        ((ids, jnp.array([1])), r"the lengths of prompt must be \[2\], not \[1\]"),
        ((ids, jnp.array([3, 4])), "the length of prompt 1 must be from 1 to 3, not 4"),
        ((ids, jnp.array([0, 3])), "the length of prompt 0 must be from 1 to 3, not 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(rules=[TopK(2)], prompt=prompt)


@pytest.mark.parametrize("name", ["greedy", "sample"])
def test_parts_that_do_not_fit(name):
    model = Historian.random(0, 5, VOCAB)
    search = functools.partial(SEARCHES[name], model.step)
    begun = search(model.cache(2), START, max_new_tokens=5, steps=2)
    with pytest.raises(ValueError, match=r"begun has tokens \[2, 5\], not \[2, 4\]"):
        search(begun.cache, START, max_new_tokens=4, begun=begun)
    with pytest.raises(ValueError, match="token_scores=True is not what begun"):
        search(begun.cache, START, max_new_tokens=5, begun=begun, token_scores=True)
    for steps, message in [(0, "steps must be at least 1, not 0"), (1.0, "must be an integer")]:
        with pytest.raises(ValueError, match=message):
            search(model.cache(2), START, max_new_tokens=5, steps=steps)


@pytest.mark.parametrize("rule", [MinP, TopP, Temperature, RepetitionPenalty])
def test_what_is_above_zero_stays_so_in_float32(rule):
    logits = jnp.array([[0.5, 0.7, -0.2, 0.1]])
    history = History(jnp.array([[3]]), jnp.array([0]), np.int32(1), np.int32(1), 4)
    ruled = rule(1e-46)(logits, history)
    # The token that was there is worth a reward, by a penalty below 1; else the best stays best.
    best = 3 if rule is RepetitionPenalty else 1
    assert not jnp.isnan(ruled).any() and ruled[0].argmax() == best


def test_rules_without_history_keep_none():
    """A program without rules is the one that it would be without the argument."""
    model = Historian.random(0, 5, VOCAB)

    def text(**options):
        run = functools.partial(greedy, model.step, max_new_tokens=5, eos_id=EOS, **options)
        return jax.jit(run).lower(model.cache(2), START).as_text()

    assert text() == text(rules=(), token_scores=False)
    assert text() != text(rules=(NoRepeatNgram(2),))


def test_beams_of_a_penalty_for_each_row():
    """A row's number is that of all of its hypotheses, in a batch and alone."""
    model, length = Historian.random(3, 6, VOCAB), 6

    def run(start, penalty):
        options = dict(beam_size=3, max_new_tokens=length, eos_id=EOS)
        cache = model.cache(len(start))
        return beam_search(
            model.step, cache, start, rules=[Normalize(), RepetitionPenalty(penalty)], **options
        )

    together = run(START, [0.4, 3.0])
    for row, penalty in enumerate([0.4, 3.0]):
        alone = run(START[row : row + 1], penalty)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    assert np.any(run(START, 3.0).tokens[0] != together.tokens[0])
