"""Loss, learning-rate schedule, optimizer, and the train and eval steps.

Array letters: B batch   S source length   T target length   V vocabulary
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mqa_jax.data import BOS_ID, EOS_ID, PAD_ID
from mqa_jax.sharding import ShardingRules, on_mesh
from mqa_jax.transformer import DecoderOnly, EncoderDecoder, TransformerConfig

Batch = Mapping[str, Array]
Metrics = dict[str, Array]

MODELS = {"translation": EncoderDecoder, "language_model": DecoderOnly}


def build_model(task: str, model: Mapping[str, Any], *, rngs: nnx.Rngs):
    """The model of a config: `config.task` and `config.model`.

    Raises:
      ValueError: an unknown task, or a field that `TransformerConfig` does not have.
    """
    if task not in MODELS:
        raise ValueError(f"task={task!r} is not one of {sorted(MODELS)}")
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if unknown := sorted(set(model) - known):
        raise ValueError(f"config.model has unknown fields {unknown}; known are {sorted(known)}")
    return MODELS[task](TransformerConfig(**model), rngs=rngs)


def cross_entropy(
    logits_BTV: Array, targets_BT: Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Array, Array]:
    """Cross-entropy in nats, without a one-hot array of the vocabulary's size.

    Args:
      logits_BTV: float32.
      targets_BT: the ids that should come out.
      label_smoothing: the share of the target distribution that is spread over all of `V`.
      z_loss: weight of `logsumexp(logits) ** 2`, which keeps the logits from drifting.

    Returns:
      the loss to train on and the plain negative log-likelihood, both `[B, T]`.
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nll_BT = log_z_BT - target_BT
    uniform_BT = log_z_BT - jnp.mean(logits_BTV, axis=-1)
    loss_BT = (1 - label_smoothing) * nll_BT + label_smoothing * uniform_BT
    return loss_BT + z_loss * jnp.square(log_z_BT), nll_BT


def rsqrt_schedule(
    learning_rate: float, total_steps: int, *, hold_steps: int, warmup_steps: int, decay_steps: int
) -> optax.Schedule:
    """`learning_rate / sqrt(max(step, hold_steps))`, with a ramp before and a linear decay behind.

    The paper's published configs have `learning_rate = 1`, `hold_steps = 10000`, no warm-up (which
    Adafactor does not need) and a linear decay over the last 20,000 steps.

    Args:
      warmup_steps: the rate rises linearly from 0 over that many steps.
      decay_steps: the rate falls linearly to 0 over the last that many of `total_steps`.
    """

    def schedule(step: Array) -> Array:
        step = jnp.asarray(step, jnp.float32)
        rate = learning_rate / jnp.sqrt(jnp.maximum(step, float(max(hold_steps, 1))))
        if warmup_steps:
            rate *= jnp.minimum(1.0, (step + 1) / warmup_steps)
        if decay_steps:
            rate *= jnp.clip((total_steps - step) / decay_steps, 0.0, 1.0)
        return rate

    return schedule


def build_optimizer(
    name: str, schedule: optax.Schedule, *, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Adafactor as the paper has it, or AdamW (betas 0.9 and 0.98, gradients clipped to norm 1).

    Raises:
      ValueError: another name.
    """
    if name == "adafactor":
        return optax.adafactor(schedule, weight_decay_rate=weight_decay or None)
    if name == "adamw":
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(schedule, b1=0.9, b2=0.98, eps=1e-9, weight_decay=weight_decay),
        )
    raise ValueError(f"optimizer {name!r} is not one of ['adafactor', 'adamw']")


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
    build: Callable[..., nnx.Module],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: ShardingRules | None = None,
) -> tuple[nnx.Module, TrainState]:
    """As `init_state`, with shapes and shardings in place of arrays: allocates nothing."""
    rules = rules or ShardingRules()
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(params=0)))
    params = nnx.state(model)
    shardings = nnx.as_pure(rules.params(mesh, params))
    params = nnx.as_pure(params)
    replicated = NamedSharding(mesh, PartitionSpec())

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
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
    return model, jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        TrainState(replicated, shardings, opt_shardings),
    )


def init_state(
    build: Callable[..., nnx.Module],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    rules: ShardingRules | None = None,
) -> tuple[nnx.Module, TrainState]:
    """The state before the first step, each array where the rules put it.

    Args:
      build: makes the model from `rngs=`.
      seed: of the weights.
      rules: `ShardingRules()` when None.

    Returns:
      the model with shapes in place of weights, which the functions below take their structure
      from, and the state.
    """
    model, abstract = abstract_state(build, optimizer, mesh, rules)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    with on_mesh(mesh, rules or ShardingRules()):
        params = nnx.as_pure(nnx.state(build(rngs=nnx.Rngs(params=seed))))
    # What `param` did not make: the norms, which are small.
    params = jax.device_put(params, shardings.params)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    return model, TrainState(jax.device_put(jnp.int32(0), shardings.step), params, opt_state)


def segments(tokens_BT: Array) -> tuple[Array, Array]:
    """Which sentence of its row each token is of, and which token of the sentence it is.

    On the device, so that what the host sends for each step is the tokens alone.

    Args:
      tokens_BT: sentences one behind the other, each up to its EOS, then padding.

    Returns:
      segment ids, from 1 and 0 for padding, and positions, from 0; both int32 `[B, T]`.
    """
    index_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    is_first_BT = (jnp.roll(tokens_BT, 1, axis=1) == EOS_ID) | (index_T == 0)
    first_BT = jax.lax.cummax(jnp.where(is_first_BT, index_T, 0), axis=1)
    segment_ids_BT = jnp.cumsum(is_first_BT, axis=1, dtype=jnp.int32)
    is_token_BT = tokens_BT != PAD_ID
    return jnp.where(is_token_BT, segment_ids_BT, 0), jnp.where(is_token_BT, index_T - first_BT, 0)


def apply(model: EncoderDecoder | DecoderOnly, batch: Batch, rngs: nnx.Rngs | None) -> Array:
    """Logits `[B, T, V]` of a batch.

    Args:
      model: with its weights.
      batch: `target_tokens`, int32 `[B, T]`, and for a translation `source_tokens`, `[B, S]`, as
        `mqa_jax.data.loader` makes them: sentences one behind the other, each up to its EOS, then
        padding. What the model is given to predict a token is BOS or the one before.
      rngs: dropout is applied when given.
    """
    targets_BT = batch["target_tokens"]
    segment_ids_BT, positions_BT = segments(targets_BT)
    inputs_BT = jnp.where(positions_BT == 0, BOS_ID, jnp.roll(targets_BT, 1, axis=1))
    if isinstance(model, DecoderOnly):
        return model(inputs_BT, segment_ids=segment_ids_BT, positions=positions_BT, rngs=rngs)
    source_segment_ids_BS, source_positions_BS = segments(batch["source_tokens"])
    return model(
        batch["source_tokens"],
        inputs_BT,
        source_segment_ids=source_segment_ids_BS,
        target_segment_ids=segment_ids_BT,
        source_positions=source_positions_BS,
        target_positions=positions_BT,
        rngs=rngs,
    )


def make_train_step(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    *,
    seed: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    accumulate: int = 1,
    rules: ShardingRules | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted update; the state handed in is donated.

    Dropout masks follow from `seed` and the step alone, so that a resumed run draws the same ones.
    Where the loss or a gradient is not finite the update is skipped: weights and optimizer stay as
    they are, and only the step, which is the position in the data, goes on.

    Args:
      model: its structure, from `init_state`.
      optimizer: what turns gradients into updates.
      state: whose shardings the new states keep; its values are not used.
      seed: of dropout.
      label_smoothing: see `cross_entropy`.
      z_loss: see `cross_entropy`.
      accumulate: gradients of so many parts of a batch are summed one after the other before the
        update, which saves memory; it must divide the rows of a batch.
      rules: those of the state; `ShardingRules()` when None.

    Returns:
      a function of state and batch (see `apply`) to the new state and the metrics `loss`,
      `ln_perplexity` (both the mean a target token, in nats), `accuracy`, `gradient_norm`, `tokens`
      (target tokens) and `skipped` (1 for an update that was skipped, else 0).

    Raises:
      ValueError: `accumulate` below 1, or (of the function returned) a batch that it does not
        divide.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, not {accumulate}")
    graphdef = nnx.graphdef(model)

    def loss_fn(params: nnx.State, batch: Batch, key: Array):
        with on_mesh(state.step.sharding.mesh, rules or ShardingRules()):
            logits_BTV = apply(nnx.merge(graphdef, params), batch, nnx.Rngs(dropout=key))
        loss_BT, nll_BT = cross_entropy(
            logits_BTV, batch["target_tokens"], label_smoothing=label_smoothing, z_loss=z_loss
        )
        sums = _sums(loss_BT, nll_BT, logits_BTV, batch)
        return sums["loss"], sums

    def gradients_and_sums(params: nnx.State, batch: Batch, key: Array):
        """Of the whole batch, from its parts; of the sums of the loss, since these add up."""
        gradient = jax.grad(loss_fn, has_aux=True)
        if accumulate == 1:
            return gradient(params, batch, key)

        def part(x: Array) -> Array:
            """`[B, ...]` to `[accumulate, B / accumulate, ...]`, each row where it lies."""
            if x.shape[0] % accumulate:
                raise ValueError(
                    f"a batch of {x.shape[0]} rows cannot be taken in {accumulate} parts: choose "
                    "train.accumulate so that it divides train.batch_size"
                )
            return jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)

        def add(total, part_and_key):
            return jax.tree.map(jnp.add, total, gradient(params, *part_and_key)), None

        parts = jax.tree.map(part, dict(batch)), jax.random.split(key, accumulate)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, *first)
        )
        return jax.lax.scan(add, zeros, parts)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        gradients, sums = gradients_and_sums(state.params, batch, key)
        tokens = jnp.maximum(sums["tokens"], 1)
        gradients = jax.tree.map(lambda x: (x / tokens).astype(x.dtype), gradients)
        gradient_norm = optax.tree.norm(gradients)
        is_finite = jnp.isfinite(gradient_norm) & jnp.isfinite(sums["loss"])
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        skipped = (~is_finite).astype(jnp.float32)
        metrics = mean_metrics(sums) | {"gradient_norm": gradient_norm, "skipped": skipped}
        return TrainState(state.step + 1, params, opt_state), metrics

    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def set_up(
    config: Any, mesh: Mesh, *, is_abstract: bool = False
) -> tuple[nnx.Module, TrainState, Callable[[TrainState, Batch], tuple], optax.Schedule]:
    """What a config file trains, for train.py to run and for `compile_only` to compile.

    Args:
      config: a config file's `ConfigDict`.
      is_abstract: `abstract_state` in place of `init_state`.

    Returns:
      the model's structure, the state, the train step, and the learning rate by step.
    """
    settings = config.train
    schedule = rsqrt_schedule(
        settings.learning_rate,
        settings.steps,
        hold_steps=settings.hold_steps,
        warmup_steps=settings.warmup_steps,
        decay_steps=settings.decay_steps,
    )
    optimizer = build_optimizer(settings.optimizer, schedule, weight_decay=settings.weight_decay)
    build = functools.partial(build_model, config.task, config.model.to_dict())
    if is_abstract:
        model, state = abstract_state(build, optimizer, mesh)
    else:
        model, state = init_state(build, optimizer, mesh, settings.seed)
    train_step = make_train_step(
        model,
        optimizer,
        state,
        seed=settings.seed,
        label_smoothing=settings.label_smoothing,
        z_loss=settings.z_loss,
        accumulate=settings.accumulate,
    )
    return model, state, train_step, schedule


def train_flops(model: nnx.Module, rows: int, source_length: int, target_length: int) -> int:
    """Floating-point operations of a train step that the model itself asks for.

    Two a weight and token forward, and four a query head, head dim and pair of positions in
    attention (a causal mask or a window saves nothing, padding counts); twice as many backward.
    Norms, dropout, the optimizer and what `remat` computes again do not count.

    Args:
      model: as `init_state` returns it.
      rows: of a batch.
      source_length: tokens of a row; of no meaning for a language model.
      target_length: likewise.
    """
    sources, targets = source_length, target_length
    config, decoder = model.config, model.decoder.layers[0]
    pairs = targets * targets
    # Weights that are multiplied with, and how many tokens each.
    products = [(getattr(model, "softmax", model.embedding), targets)]
    products += [(decoder.attention, targets), (decoder.feed_forward, targets)] * config.num_layers
    if isinstance(model, EncoderDecoder):
        encoder, cross = model.encoder_layers[0], decoder.cross_attention
        pairs += sources * sources + targets * sources
        products += [
            (encoder.attention, sources),
            (encoder.feed_forward, sources),
            (nnx.List([cross.query, cross.out]), targets),
            (nnx.List([cross.key, cross.value]), sources),
        ] * config.num_layers
    forward = sum(
        2 * sum(x.size for x in jax.tree.leaves(nnx.state(module))) * tokens
        for module, tokens in products
    )
    forward += 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    return 3 * rows * forward


def make_eval_step(
    model: nnx.Module, mesh: Mesh, rules: ShardingRules | None = None
) -> Callable[[nnx.State, Batch], Metrics]:
    """A jitted function of parameters and batch to sums over tokens, for `mean_metrics`.

    Args:
      model: its structure, from `init_state`.
      mesh: where parameters and batches are.
      rules: those of the parameters; `ShardingRules()` when None.
    """
    graphdef = nnx.graphdef(model)

    @jax.jit
    def eval_step(params: nnx.State, batch: Batch) -> Metrics:
        with on_mesh(mesh, rules or ShardingRules()):
            logits_BTV = apply(nnx.merge(graphdef, params), batch, rngs=None)
        loss_BT, nll_BT = cross_entropy(logits_BTV, batch["target_tokens"])
        return _sums(loss_BT, nll_BT, logits_BTV, batch)

    return eval_step


def _sums(loss_BT: Array, nll_BT: Array, logits_BTV: Array, batch: Batch) -> Metrics:
    """Sums over the tokens that are no padding; unlike means, they add up over batches."""
    targets_BT = batch["target_tokens"]
    is_token_BT = (targets_BT != PAD_ID).astype(jnp.float32)
    is_right_BT = (jnp.argmax(logits_BTV, axis=-1) == targets_BT).astype(jnp.float32)
    return {
        "loss": jnp.sum(loss_BT * is_token_BT),
        "nll": jnp.sum(nll_BT * is_token_BT),
        "right": jnp.sum(is_right_BT * is_token_BT),
        "tokens": jnp.sum(is_token_BT),
    }


def mean_metrics(sums: Metrics) -> Metrics:
    """Sums over tokens to `loss`, `ln_perplexity`, `accuracy` and `tokens`."""
    tokens = jnp.maximum(sums["tokens"], 1)
    return {
        "loss": sums["loss"] / tokens,
        "ln_perplexity": sums["nll"] / tokens,
        "accuracy": sums["right"] / tokens,
        "tokens": sums["tokens"],
    }
