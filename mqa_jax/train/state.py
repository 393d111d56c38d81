"""What a training run consists of at a moment, born where it belongs on a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mqa_jax.core.checks import check_integer
from mqa_jax.core.sharding import ShardingRules, on_mesh
from mqa_jax.model.transformer import Model

# JAX's keys, and Grain's shuffles, are made from 32 bits: of a larger one they would drop some.
MAX_SEED = 2**32 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a training run consists of at a moment.

    Attributes:
      step: updates done; also the position in the data, counted in batches.
      params: the model's weights, arrays without the `nnx.Variable` around each: JAX takes these
        apart in Python at every step, which costs milliseconds.
      opt_state: the optimizer's.
    """

    step: Array
    params: nnx.State
    opt_state: optax.OptState


def abstract_state(
    build: Callable[..., Model],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: ShardingRules | None = None,
) -> tuple[Model, TrainState]:
    """As `init_state`, with shapes and shardings in place of arrays: allocates nothing."""
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(params=0)))
    params = abstract_params(model, mesh, rules)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    # Any, as shapes and shardings stand in a state's tree where its arrays do.
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)

    def like_its_param(moment: Array, param: Array, sharding: NamedSharding) -> NamedSharding:
        # Adafactor's factored moments have other shapes than their weights, and are small.
        return sharding if moment.shape == param.shape else replicated

    opt_state = jax.eval_shape(optimizer.init, params)
    opt_shardings = optax.tree_utils.tree_map_params(
        optimizer,
        like_its_param,
        opt_state,
        params,
        shardings,
        transform_non_params=lambda _: replicated,
    )
    state = TrainState(step, params, opt_state)
    return model, jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        TrainState(replicated, shardings, opt_shardings),
    )


def abstract_params(model: Model, mesh: Mesh, rules: ShardingRules | None = None) -> nnx.State:
    """A model's weights as shapes, each with its place on a mesh."""
    params = nnx.state(model)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        nnx.as_pure(params),
        nnx.as_pure((rules or ShardingRules()).params(mesh, params)),
    )


def init_state(
    build: Callable[..., Model],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    rules: ShardingRules | None = None,
    params: Callable[[nnx.State, Mesh], nnx.State] | None = None,
) -> tuple[Model, TrainState]:
    """The state before the first step, each array where the rules put it.

    Args:
      build: makes the model from `rngs=`.
      seed: of the weights, from 0 to `MAX_SEED`.
      rules: `ShardingRules()` when None.
      params: the weights, from their shapes and places, and the mesh; drawn when None.

    Returns:
      the model with shapes in place of weights, which the functions below take their structure
      from, and the state.

    Raises:
      ValueError: a seed out of range, or a mesh that does not divide the model's sizes.
    """
    check_integer("seed", seed, least=0, most=MAX_SEED)
    model, abstract = abstract_state(build, optimizer, mesh, rules)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    if params is None:
        with on_mesh(mesh, rules or ShardingRules()):
            weights = nnx.as_pure(nnx.state(build(rngs=nnx.Rngs(params=seed))))
    else:
        weights = params(abstract.params, mesh)
    # What `param` did not make: the norms, which are small.
    weights = jax.device_put(weights, shardings.params)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(weights)
    return model, TrainState(jax.device_put(jnp.int32(0), shardings.step), weights, opt_state)
