"""From a config file to what it trains, and what a step of that costs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from mqa_jax.data import OWN_IDS, SpecialIds
from mqa_jax.model.transformer import EncoderDecoder, Model, build_model
from mqa_jax.train.diagnose import make_diagnosis
from mqa_jax.train.optimizer import build_optimizer, rsqrt_schedule
from mqa_jax.train.state import TrainState, abstract_state, init_state
from mqa_jax.train.step import make_train_step


def set_up(
    config: Any,
    mesh: Mesh,
    *,
    is_abstract: bool = False,
    ids: SpecialIds = OWN_IDS,
    params: Callable[[nnx.State, Mesh], nnx.State] | None = None,
    teacher: Model | None = None,
) -> tuple[Model, TrainState, jax.stages.Wrapped, optax.Schedule]:
    """What a config file trains, for train.py to run and for `compile_only` to compile.

    Args:
      config: a config file's `ConfigDict`.
      is_abstract: `abstract_state` in place of `init_state`.
      ids: of the batches, as the tokenizer has them.
      params: as for `init_state`.
      teacher: the structure of `config.train.teacher`, whose weights the train step is then given.

    Returns:
      the model's structure, the state, the train step, and the learning rate by step.
    """
    settings, schedule = config.train, schedule_of(config)
    optimizer = build_optimizer(settings.optimizer, schedule, weight_decay=settings.weight_decay)
    build = functools.partial(build_model, config.task, config.model.to_dict())
    if is_abstract:
        model, state = abstract_state(build, optimizer, mesh)
    else:
        model, state = init_state(build, optimizer, mesh, settings.seed, params=params)
    options = step_options(config)
    train_step = make_train_step(
        model, optimizer, state, seed=settings.seed, teacher=teacher, ids=ids, **options
    )
    return model, state, train_step, schedule


def schedule_of(config: Any) -> optax.Schedule:
    """The learning rate by step."""
    settings = config.train
    return rsqrt_schedule(
        settings.learning_rate,
        settings.steps,
        hold_steps=settings.hold_steps,
        warmup_steps=settings.warmup_steps,
        decay_steps=settings.decay_steps,
    )


def diagnosis(
    config: Any, model: Model, mesh: Mesh, ids: SpecialIds, teacher: Model | None = None
) -> Callable[..., str]:
    """What says why a step of `set_up` was skipped; see `make_diagnosis`."""
    options = step_options(config)
    return make_diagnosis(model, mesh, teacher=teacher, ids=ids, seed=config.train.seed, **options)


def step_options(config: Any) -> dict[str, Any]:
    """The arguments of `make_update` that a config has."""
    names = ("label_smoothing", "z_loss", "r_drop", "distillation", "accumulate")
    return {name: config.train[name] for name in names}


def step_flops(config: Any, model: Model, teacher: Model | None = None) -> int:
    """`train_flops` of a step of a config: of two readings with R-Drop, and with a teacher's."""
    rows = config.train.batch_size
    lengths = config.data.source_length, config.data.target_length
    flops = train_flops(model, rows * (2 if config.train.r_drop else 1), *lengths)
    # A third of a step's is forward.
    return flops if teacher is None else flops + train_flops(teacher, rows, *lengths) // 3


def train_flops(model: Model, rows: int, source_length: int, target_length: int) -> int:
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
    pairs = config.num_layers * targets * targets
    # Weights that are multiplied with, and how many tokens each.
    products: list[tuple[nnx.Module, int]] = [(model.softmax or model.embedding, targets)]
    products += [(decoder.attention, targets), (decoder.feed_forward, targets)] * config.num_layers
    if isinstance(model, EncoderDecoder):
        encoder, cross = model.encoder_layers[0], decoder.cross_attention
        layers = len(model.encoder_layers)
        pairs += layers * sources * sources + config.num_layers * targets * sources
        products += [
            (encoder.attention, sources),
            (encoder.feed_forward, sources),
        ] * layers
        products += [
            (nnx.List([cross.query, cross.out]), targets),
            (nnx.List([cross.key, cross.value]), sources),
        ] * config.num_layers
    forward = sum(
        2 * sum(x.size for x in jax.tree.leaves(nnx.state(module))) * tokens
        for module, tokens in products
    )
    forward += 4 * config.num_heads * config.head_dim * pairs
    return 3 * rows * forward
