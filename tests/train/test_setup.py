"""What a config trains, and what a step of that costs."""

import inspect

from stepping import GRADIENT_DESCENT, initial

from mqa_jax.core.config import base_config
from mqa_jax.train.setup import step_flops, step_options, train_flops
from mqa_jax.train.step import make_gradients


def test_flops_of_a_step():
    """By hand: D=14, F=18, N=4, K=1, H=5, V=22, two layers; three rows of 7 source, 5 target."""
    heads, ff = 14 * 5 * (4 + 1 + 1 + 4), 2 * 14 * 18
    encoder = 7 * 2 * (heads + ff) + 4 * 4 * 5 * 7 * 7
    decoder = 5 * 2 * (heads + ff) + 4 * 4 * 5 * 5 * 5
    cross = 5 * 2 * 14 * 5 * 8 + 7 * 2 * 14 * 5 * 2 + 4 * 4 * 5 * 5 * 7
    softmax = 5 * 2 * 14 * 22
    expected = dict(translation=2 * (encoder + decoder + cross), language_model=2 * decoder)
    for task, layers in expected.items():
        model, _ = initial(task, GRADIENT_DESCENT, num_layers=2)
        assert train_flops(model, 3, 7, 5) == 3 * 3 * (layers + softmax)
        config = base_config()
        config.train.batch_size = 3
        config.data.update(source_length=7, target_length=5)
        assert step_flops(config, model) == 9 * (layers + softmax)
        config.train.r_drop = 1.0
        assert step_flops(config, model) == 18 * (layers + softmax)
        assert step_flops(config, model, model) == 21 * (layers + softmax)


def test_a_config_has_every_option_of_a_step():
    found = step_options(base_config())
    own = inspect.signature(make_gradients).parameters.values()
    options = {p.name: p.default for p in own if p.kind is p.KEYWORD_ONLY}
    for name in ("teacher", "rules", "ids"):
        options.pop(name)
    assert found == options
