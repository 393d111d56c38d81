"""The state of a run: what it is made of, and where it lies on a mesh."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from stepping import ADAMW, MAX_LENGTH, SIZES, initial, mesh_of

from mqa_jax.core.sharding import make_mesh
from mqa_jax.model.transformer import build_model
from mqa_jax.train.state import MAX_SEED, init_state

SHARD_SHAPES = {  # Of the sizes above, on the mesh (2, 2, 2).
    "embedding/table": (11, 7),
    "positions/table": (MAX_LENGTH, 7),
    "attention/query": (2, 5, 7),
    "attention/key": (1, 5, 7),
    "attention/value": (1, 5, 7),
    "attention/out": (7, 2, 5),
    "feed_forward/wi": (9, 7),
    "feed_forward/wo": (7, 9),
    "scale": None,
}


def named(tree):
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_no_device_ever_holds_more_of_a_weight_than_its_part(monkeypatch):
    """What is made on one device, and then moved, is small: the norms' scales."""
    moved = []
    original = jax.device_put

    def device_put(tree, *args, **kwargs):
        moved.extend(
            x.size
            for x in jax.tree.leaves(tree)
            if isinstance(x, jax.Array) and x.is_fully_addressable and len(x.devices()) == 1
        )
        return original(tree, *args, **kwargs)

    monkeypatch.setattr(jax, "device_put", device_put)
    build = functools.partial(build_model, "translation", SIZES)
    init_state(build, ADAMW, make_mesh(2, 2, 2), 3)
    assert moved and max(moved) <= SIZES["d_model"]


def test_each_weight_is_made_where_it_belongs():
    _, state = initial("translation", ADAMW, (2, 2, 2))
    _, alone = initial("translation", ADAMW)
    # JAX would call Python for each Variable at every step.
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    assert not any(map(is_variable, jax.tree.leaves(state, is_leaf=is_variable)))
    weights, seen = named(state.params), set()
    for name, x in weights.items():
        kind = next(kind for kind in SHARD_SHAPES if kind in name)
        seen.add(kind)
        shards = {shard.data.shape for shard in x.addressable_shards}
        # Norms are replicated, or split as D is: 14 numbers, so either will do.
        expected = {SHARD_SHAPES[kind]} if SHARD_SHAPES[kind] else shards & {(14,), (7,)}
        assert shards == expected, name
        assert len(x.addressable_shards) == 8
        # Vectors of another length round the normal distribution's inverse in other places.
        np.testing.assert_allclose(x, named(alone.params)[name], rtol=1e-6, err_msg=name)
    assert seen == set(SHARD_SHAPES)

    moments = {name: x for name, x in named(state.opt_state).items() if x.ndim}
    assert len(moments) == 2 * len(weights)
    for name, x in moments.items():
        weight = next(w for suffix, w in weights.items() if name.endswith(f"/{suffix}"))
        assert x.sharding.is_equivalent_to(weight.sharding, x.ndim), name
    for x in (state.step, *(x for x in jax.tree.leaves(state.opt_state) if not x.ndim)):
        assert len(x.sharding.device_set) == 8 and x.sharding.is_fully_replicated


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0])
def test_a_seed_that_makes_no_sense(seed):
    build = functools.partial(build_model, "translation", SIZES)
    with pytest.raises(ValueError, match=f"seed must be .*, not {seed}"):
        init_state(build, ADAMW, make_mesh(), seed)


def test_the_largest_seed_is_one_of_its_own():
    build = functools.partial(build_model, "language_model", SIZES)
    tables = [
        np.asarray(init_state(build, ADAMW, mesh_of(1, 1, 1), seed)[1].params["embedding"]["table"])
        for seed in (0, MAX_SEED, MAX_SEED - 1)
    ]
    assert len({table.tobytes() for table in tables}) == 3
