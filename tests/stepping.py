"""A model of few weights, batches and steps of it, as the tests of training share them.

B batch   S source length   T target length   V vocabulary
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mqa_jax.core.sharding import MESH_AXES, make_mesh
from mqa_jax.data import EOS_ID
from mqa_jax.data.packing import to_tokens
from mqa_jax.model.transformer import MODELS, build_model
from mqa_jax.train.optimizer import build_optimizer
from mqa_jax.train.state import init_state
from mqa_jax.train.step import make_train_step

MAX_LENGTH = 16

SIZES = dict(
    vocab_size=22,
    d_model=14,
    d_ff=18,
    num_layers=1,
    num_heads=4,
    num_kv_heads=1,
    head_dim=5,
    max_length=MAX_LENGTH,
)

both_tasks = pytest.mark.parametrize("task", MODELS)


@jax.numpy_dtype_promotion("standard")
def leniently(function, *args):
    return function(*args)


def lenient(optimizer):
    """Optax promotes integer step counts to float, which the strictness of these tests forbids."""
    return optimizer._replace(update=functools.partial(leniently, optimizer.update))


ADAMW = lenient(build_optimizer("adamw", lambda _: 0.01, weight_decay=0.01))

ADAFACTOR = lenient(build_optimizer("adafactor", lambda _: 0.05))

GRADIENT_DESCENT = optax.sgd(1.0)  # The weights then differ by the gradient.


def mesh_of(*sizes):
    if sizes != (1, 1, 1):
        return make_mesh(*sizes)
    return jax.make_mesh(sizes, MESH_AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1])


@functools.cache
def initial(task, optimizer, sizes=(1, 1, 1), **changes):
    build = functools.partial(build_model, task, SIZES | changes)
    return init_state(build, optimizer, mesh_of(*sizes), 3)


def begin(task, optimizer, sizes=(1, 1, 1), **changes):
    """The model, and a state of one's own, which may be donated."""
    model, state = initial(task, optimizer, sizes, **changes)
    return model, jax.tree.map(jnp.copy, state)


def put(batch, sizes=(1, 1, 1)):
    return jax.device_put(batch, NamedSharding(mesh_of(*sizes), PartitionSpec(("data", "fsdp"))))


def sentences(*lengths):
    """Pairs of them, of these lengths with their EOS."""
    rng = np.random.default_rng(0)
    return [
        tuple(np.append(rng.integers(3, 22, n - 1), EOS_ID).astype(np.int32) for n in pair)
        for pair in lengths
    ]


def make_batch(rows, source_length, target_length):
    """Rows of pairs of sentences, one behind the other."""
    lengths = source_length, target_length
    source, target = np.split(
        np.array([to_tokens(row, *lengths) for row in rows]), [source_length], axis=1
    )
    return dict(source_tokens=source, target_tokens=target)


def close(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), actual, expected)


def random_batch(rows=8):
    return make_batch([[pair] for pair in sentences(*[(6, 5)] * rows)], 7, 5)


@functools.cache
def make_step(task, optimizer, sizes=(1, 1, 1)):
    model, state = initial(task, optimizer, sizes)
    return make_train_step(model, optimizer, state, seed=0, label_smoothing=0.1, z_loss=1e-4)
