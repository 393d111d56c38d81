"""The rules of transformers' beam search, against plain Python that follows its `generate`.

B batch   V vocabulary   L max_new_tokens   b beam
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_beam import check_hypotheses, reference_beam_search
from toy_models import EOS, START, Chain, Historian, compiled, decode, property_test, seeds

from mqa_jax import beam_search
from mqa_jax.decode.beam import TRANSFORMERS, BeamRules, length_penalty, power_penalty
from mqa_jax.decode.rules import (
    Forbid,
    ForceFirst,
    ForceLast,
    MinNewTokens,
    NoRepeatNgram,
    Normalize,
    RepetitionPenalty,
)

LOW = -1e9  # What its scores are that stand for nothing.


def beam_search_of_transformers(
    model, start, beam, length, alpha, ends, early_stopping, change=lambda history, x: x
):
    """One row of it, step by step, with `change` in place of its logits processors.

    Returns:
      the hypotheses, best first, and how many steps it took.
    """
    live, finished = [(0.0, (start,))], []
    for step in range(1, length + 1):
        candidates = [
            (score + log_prob, (*history, token))
            for score, history in live
            for token, log_prob in enumerate(change(history, model.log_prob(history)))
        ]
        kept = sorted(candidates, reverse=True)[: max(2, 1 + len(ends)) * beam]
        hits = [history[-1] in ends or step == length for _, history in kept]
        is_full = len(finished) == beam and early_stopping is True
        new = [
            (score / step**alpha, history)
            for (score, history), hit in list(zip(kept, hits, strict=True))[:beam]
            if hit and not is_full and score > LOW
        ]
        finished = sorted(finished + new, reverse=True)[:beam]
        live = [c for c, hit in zip(kept, hits, strict=True) if not hit and c[0] > LOW][:beam]
        if len(finished) < beam and live:
            continue
        reach = length if early_stopping == "never" and alpha > 0 else step
        if not live or early_stopping is True or live[0][0] / reach**alpha <= finished[-1][0]:
            break
    return finished, step


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("alpha, ends", [(0.0, [EOS]), (1.0, [4, EOS]), (0.6, []), (1.7, [EOS])])
@given(seed=seeds, eos_bias=st.sampled_from([-1.0, 0.5, 2.0]))
@property_test(25)
def test_the_rules_of_transformers(early_stopping, alpha, ends, seed, eos_bias):
    vocab, length, beam = 7, 6, 3
    model = Historian.random(seed, length, vocab, eos_bias)
    rules = dataclasses.replace(TRANSFORMERS, early_stopping=early_stopping)
    options = dict(beam_size=beam, max_new_tokens=length, alpha=alpha, beam_rules=rules)
    decoded = decode(beam_search, model, START, eos_id=(*ends,) or None, **options)
    stops = []
    for row, token in enumerate(START.tolist()):
        arguments = (model, token, beam, length, alpha, ends, early_stopping)
        expected, stop = beam_search_of_transformers(*arguments)
        check_hypotheses(decoded, row, expected)
        stops.append(stop)
    assert decoded.steps == max(stops)
    assert np.all(decoded.is_finite)


def test_each_rule_makes_a_difference():
    """Over some models: else the test above would not see it broken."""

    def found(alpha=0.6, **changes):
        rules = dataclasses.replace(TRANSFORMERS, **changes)
        options = dict(beam_size=3, max_new_tokens=6, eos_id=EOS, alpha=alpha, beam_rules=rules)
        models = [Historian.random(seed, 6, 7, bias) for seed in range(8) for bias in (-1.0, 1.0)]
        return [decode(beam_search, model, START, **options) for model in models]

    def differ(some, others, name):
        return any(
            np.any(getattr(a, name) != getattr(b, name)) for a, b in zip(some, others, strict=True)
        )

    usual = found()
    assert differ(usual, found(length_penalty=length_penalty), "score")
    for changes in (
        dict(only_best_end=False),
        dict(limit_ends=False),
        dict(early_stopping=True),
        dict(early_stopping="never"),
    ):
        assert differ(usual, found(**changes), "tokens"), changes


def change_of(rules, length):
    """What transformers' processors of the same names make of log-probabilities, one by one."""

    def change(history, log_probs):
        scores, step = np.array(log_probs), len(history) - 1
        for rule in rules:
            match rule:
                case Forbid(phrases):
                    for phrase in phrases:
                        *first, last = phrase if isinstance(phrase, tuple) else (phrase,)
                        if (
                            len(first) <= len(history)
                            and [*history[len(history) - len(first) :]] == first
                        ):
                            scores[last] = -np.inf
                case ForceFirst(token):
                    if len(history) == 1:
                        scores[:], scores[token] = -np.inf, 0.0
                case ForceLast(token):
                    if step == length - 1:
                        scores[:], scores[token] = -np.inf, 0.0
                case MinNewTokens(count, eos):
                    if step < count:
                        scores[eos] = -np.inf
                case RepetitionPenalty(penalty):
                    for token in {*history}:
                        scores[token] *= penalty if scores[token] < 0 else 1 / penalty
                case NoRepeatNgram(size):
                    grams = [history[i : i + size] for i in range(len(history) - size + 1)]
                    for gram in grams:
                        if gram[:-1] == history[len(history) - size + 1 :]:
                            scores[gram[-1]] = -np.inf
                case Normalize():
                    scores -= np.log(np.sum(np.exp(scores)))
        return scores

    return change


MARIAN = (Forbid((5,)), ForceLast(EOS))
RULES = {
    "marian": MARIAN,
    "marian, renormalized": (*MARIAN, Normalize()),
    "phrases": (Forbid(((3, 4), (1,), (6, 6, 0))), MinNewTokens(3, EOS)),
    "languages": (ForceFirst(5), ForceLast(EOS)),
    "repetition": (RepetitionPenalty(1.7), NoRepeatNgram(2)),
    "no token twice": (NoRepeatNgram(1), Normalize()),
}


@pytest.mark.parametrize("name", RULES)
@given(seed=seeds, eos_bias=st.sampled_from([-1.0, 1.0]))
@property_test(20)
def test_rules_on_log_probabilities(name, seed, eos_bias):
    vocab, length, beam, alpha = 7, 5, 3, 1.0
    model, rules = Historian.random(seed, length, vocab, eos_bias), RULES[name]
    options = dict(beam_size=beam, max_new_tokens=length, alpha=alpha, eos_id=EOS)
    decoded = decode(beam_search, model, START, rules=rules, beam_rules=TRANSFORMERS, **options)
    for row, token in enumerate(START.tolist()):
        expected, _ = beam_search_of_transformers(
            model, token, beam, length, alpha, [EOS], False, change_of(rules, length)
        )
        check_hypotheses(decoded, row, expected)


@given(seed=seeds, eos_bias=st.sampled_from([-1.0, 1.0]))
@property_test(20)
def test_rules_before_the_softmax(seed, eos_bias):
    """Their own search with its default: what is forbidden leaves its probability to the others."""

    class Ruled(Historian):
        def log_prob(self, history):
            log_prob = super().log_prob(history)
            log_prob[5] = -np.inf
            return log_prob - np.log(np.sum(np.exp(log_prob)))

    vocab, length, beam = 7, 5, 3
    model = Ruled(*Historian.random(seed, length, vocab, eos_bias))
    options = dict(beam_size=beam, max_new_tokens=length, alpha=0.6, eos_id=EOS)
    plain = Historian(*model)
    decoded = decode(beam_search, plain, START, rules=(Forbid((5,)),), **options)
    for row, token in enumerate(START.tolist()):
        expected, _, _ = reference_beam_search(model, token, beam, length, 0.6)
        check_hypotheses(decoded, row, expected)


@pytest.mark.parametrize("on_log_probs", [False, True])
def test_a_hypothesis_without_a_token_has_no_offspring(on_log_probs):
    """After 3 nothing may come; that is no fault of the model, and the others go on."""
    phrases = tuple((3, token) for token in range(7))
    model = Historian.random(0, 5, 7)
    rules = dict(rules=(Forbid(phrases),), beam_rules=BeamRules(on_log_probs=on_log_probs))
    options = dict(beam_size=4, max_new_tokens=5, eos_id=EOS) | rules
    decoded = decode(beam_search, model, START, **options)
    assert np.all(decoded.is_finite) and np.all(decoded.score > -np.inf)
    assert not np.any(decoded.tokens[..., :-1] == 3)
    stuck = decode(beam_search, model, [3], **options)
    assert stuck.steps == 1 and np.all(stuck.score == -np.inf) and not np.any(stuck.length)


@pytest.mark.parametrize("on_log_probs", [False, True])
def test_a_rule_does_not_hide_what_is_no_number(on_log_probs):
    logits_LVV = np.random.default_rng(0).normal(size=(4, 7, 7)).astype(np.float32)
    logits_LVV[0, 4, 5] = np.nan
    rules = dict(rules=(Forbid((5,)),), beam_rules=BeamRules(on_log_probs=on_log_probs))
    decoded = decode(
        beam_search, Chain(jnp.asarray(logits_LVV)), START, beam_size=2, max_new_tokens=4, **rules
    )
    np.testing.assert_array_equal(decoded.is_finite, [True, False])


@pytest.mark.parametrize(
    "beam_rules", [pytest.param(BeamRules(), marks=pytest.mark.slow), TRANSFORMERS]
)
def test_a_score_for_each_token(beam_rules):
    """The model's own; they add up to that of the hypothesis where no rule is asked."""
    length, alpha = 6, 1.0
    options = dict(beam_size=3, max_new_tokens=length, eos_id=EOS, alpha=alpha)
    for seed in range(4):
        model = Historian.random(seed, length, 7, 1.0)
        for rules in ((), (Forbid((5,)),)):
            asked = options | dict(beam_rules=beam_rules, rules=rules)
            decoded = decode(beam_search, model, START, token_scores=True, **asked)
            plain = decode(beam_search, model, START, **asked)
            assert plain.token_scores is None
            np.testing.assert_array_equal(plain.tokens, decoded.tokens)
            for row, start in enumerate(START.tolist()):
                for i in range(3):
                    n = decoded.length[row, i]
                    history = [start, *decoded.tokens[row, i, :n].tolist()]
                    expected = [model.log_prob(history[:j])[history[j]] for j in range(1, n + 1)]
                    np.testing.assert_allclose(
                        decoded.token_scores[row, i], expected + [0.0] * (length - n), atol=1e-5
                    )
                    if not rules:
                        total = decoded.score[row, i] * beam_rules.length_penalty(float(n), alpha)
                        if beam_rules is TRANSFORMERS or history[-1] == EOS:
                            np.testing.assert_allclose(sum(expected), total, atol=1e-5)


def test_no_rules_carry_no_history():
    """A search without rules is the program that it is without the arguments for them."""
    model = Historian.random(0, 5, 7)

    def text(**more):
        run = compiled(beam_search, beam_size=2, max_new_tokens=5, eos_id=EOS, **more)
        return run.lower(model, jnp.asarray(START)).as_text()

    assert text() == text(rules=(), token_scores=False, beam_rules=BeamRules())
    assert text() != text(rules=(NoRepeatNgram(2),))


def test_numbers_that_make_no_sense():
    for options, message in [
        (dict(early_stopping="always"), "True, False or \"never\", not 'always'"),
        (dict(early_stopping=1), 'True, False or "never", not 1'),
        (dict(only_best_end="yes"), "only_best_end must be True or False, not 'yes'"),
        (dict(limit_ends=None), "limit_ends must be True or False, not None"),
        (dict(on_log_probs=0), "on_log_probs must be True or False, not 0"),
        (dict(length_penalty=0.6), "must be a function of length and alpha, not 0.6"),
    ]:
        with pytest.raises(ValueError, match=message):
            BeamRules(**options)
    model = Historian.random(0, 5, 7)
    options = dict(beam_size=2, max_new_tokens=5)
    with pytest.raises(ValueError, match="beam_rules must be BeamRules, not 'transformers'"):
        beam_search(model.step, model.cache(2), START, beam_rules="transformers", **options)
    with pytest.raises(ValueError, match=r"alpha=100\.0 makes length penalties"):
        beam_search(
            model.step, model.cache(2), START, alpha=100.0, beam_rules=TRANSFORMERS, **options
        )
    run = jax.jit(
        lambda alpha: beam_search(
            model.step, model.cache(2), START, alpha=alpha, beam_rules=TRANSFORMERS, **options
        )
    )
    assert not np.any(run(100.0).is_finite) and np.all(run(1.0).is_finite)
    assert power_penalty(3, 2.0) == 9.0
