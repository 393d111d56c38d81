"""Logits that are no numbers: no search makes tokens of them, nor do they reach the rows beside.

B batch   V vocabulary   L max_new_tokens   R rows
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_models import EOS, SEARCHES, Historian, decode, random_model

from mqa_jax import DecoderOnly, TransformerConfig, beam_search

BAD = {
    "one NaN": lambda logits_RV: logits_RV.at[:, 3].set(jnp.nan),
    "NaN": lambda logits_RV: jnp.full_like(logits_RV, jnp.nan),
    "infinity": lambda logits_RV: logits_RV.at[:, 3].set(jnp.inf),
    "nothing": lambda logits_RV: jnp.full_like(logits_RV, -jnp.inf),
}


@pytest.mark.parametrize("eos_id", [EOS, None])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_row_ends_where_its_logits_are_no_numbers(name, eos_id):
    """Its first tokens stand; the rows beside it are as if nothing had been."""
    model, length, pad, breaks_at = Historian.random(0, 7, 7, eos_bias=-9.0), 7, 6, 3
    tokens_B = jnp.array([1, 4, 5])

    @jax.jit
    def run(bad):
        def step_fn(tokens_R, cache):
            is_second_R = cache.pop("row") == 1
            logits_RV, new = model.step(tokens_R, cache)
            is_bad_R1 = (is_second_R & (cache["length"] >= breaks_at))[:, None]
            row_R = is_second_R.astype(jnp.int32)
            bad_RV = jax.lax.switch(bad, [lambda logits_RV: logits_RV, *BAD.values()], logits_RV)
            return jnp.where(is_bad_R1, bad_RV, logits_RV), new | {"row": row_R}

        cache = model.cache(3) | {"row": jnp.array([0, 1, 0])}
        options = dict(max_new_tokens=length, eos_id=eos_id, pad_id=pad)
        return SEARCHES[name](step_fn, cache, tokens_B, **options)

    whole = run(0)
    assert np.all(whole.is_finite) and np.all(whole.length[1] > breaks_at)
    if name == "beam_search":  # As they stood: what a search for so many tokens and no end finds.
        alone = decode(beam_search, model, [4], beam_size=3, max_new_tokens=breaks_at).tokens[0]
    else:
        alone = whole.tokens[1, :breaks_at]
    for bad in range(1, 1 + len(BAD)):
        broken = run(bad)
        np.testing.assert_array_equal(broken.is_finite, [True, False, True])
        for row in (0, 2):
            np.testing.assert_array_equal(broken.tokens[row], whole.tokens[row])
            np.testing.assert_array_equal(broken.length[row], whole.length[row])
        np.testing.assert_array_equal(broken.length[1], np.full_like(broken.length[1], breaks_at))
        assert np.all(broken.tokens[1, ..., breaks_at:] == pad)
        np.testing.assert_array_equal(broken.tokens[1, ..., :breaks_at], alone)
        if name == "beam_search":
            assert np.all(np.isfinite(broken.score))


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_what_follows_the_end_of_a_row_does_not_count(search):
    """A row that has ended is given padding until the others have; that may overflow."""
    model, start = Historian.random(0, 9, 7, eos_bias=3.0), jnp.array([1, 4])

    def step_fn(tokens_R, cache):
        logits_RV, new = model.step(tokens_R, {**cache, "length": cache["length"] % 100})
        is_slow_R1 = (cache["length"] >= 100)[:, None]
        logits_RV = jnp.where(is_slow_R1, logits_RV.at[:, EOS].set(-jnp.inf), logits_RV)
        is_bad_R1 = ~is_slow_R1 & (new["length"] == 9)[:, None]
        logits_RV = jnp.where(is_bad_R1, jnp.nan, logits_RV)
        return logits_RV, new | {"length": cache["length"] + 1}

    cache = model.cache(2) | {"length": jnp.array([0, 100])}
    decoded = jax.jit(lambda: search(step_fn, cache, start, max_new_tokens=9, eos_id=EOS))()
    assert decoded.steps == 9 and np.all(decoded.length[0] < 9)
    np.testing.assert_array_equal(decoded.is_finite, [True, True])


@pytest.mark.parametrize("kind", ["overflow", "weights", "id"])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_real_model_that_gives_no_numbers(name, kind):
    config = TransformerConfig(
        vocab_size=11,
        d_model=12,
        d_ff=17,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=5,
        max_length=6,
    )
    model, start = random_model(DecoderOnly, config), jnp.array([1, 4])
    if kind == "weights":
        model.softmax.kernel[...] = model.softmax.kernel[...].at[7, 3].set(jnp.nan)
    elif kind == "id":
        start = jnp.array([1, 11])
    search = functools.partial(SEARCHES[name], max_new_tokens=6)

    @functools.partial(jax.jit, static_argnums=0)
    def run(room, start):
        return search(model.decode, model.init_cache(2, room), start)

    decoded = run(4 if kind == "overflow" else 6, start)
    if kind != "id":
        assert not np.any(decoded.is_finite)
        assert np.all(decoded.length <= (4 if kind == "overflow" else 0))
    else:
        np.testing.assert_array_equal(decoded.is_finite, [True, False])
    if kind == "overflow":
        # What there was room for is right.
        np.testing.assert_array_equal(decoded.length, np.full_like(decoded.length, 4))
        if name == "greedy":
            np.testing.assert_array_equal(decoded.tokens[:, :4], run(6, start).tokens[:, :4])
        assert not np.any(decoded.tokens[..., 4:])
        with pytest.raises(
            ValueError, match=r"room for 4 .* holds 0: .*=6.* init_cache\(batch, 6\)"
        ):
            search(model.decode, model.init_cache(2, 4), start)
    if kind == "id":
        with pytest.raises(ValueError, match=r"tokens_B\[1\]=11 is not in the vocabulary of 11"):
            search(model.decode, model.init_cache(2, 6), start)
