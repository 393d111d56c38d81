"""Trains a converted run further, which repairs what the merging of its heads broke.

    mqa-jax convert --workdir=RUN --output=CONVERTED --num_kv_heads=1
    python train.py --config=configs/uptrain.py:0.1:CONVERTED --workdir=DIR

`0.1` is the share of the run's own steps, on its own data and with its own settings: Ainslie et al.
2023 take 0.05, and find little to gain beyond 0.1. The rate of learning is half of what the run had
at its end, before its decay, and falls to 0 over the new steps. For --merge=mean, which leaves more
to repair, raise it: --config.train.learning_rate=.
"""

from ml_collections import ConfigDict

from mqa_jax.core.checks import check_number
from mqa_jax.core.config import base_config
from mqa_jax.core.paths import local_path, read_json

WARMUP = 0.1  # Of the steps: the optimizer begins anew.
RATE = 0.5  # Of the run's: what is learned is not to be lost first.


def get_config(variant: str) -> ConfigDict:
    share, colon, directory = variant.partition(":")
    if not colon:
        raise ValueError(f"{variant!r} must be SHARE:CONVERTED, such as 0.1:runs/converted")
    try:
        alpha = check_number("the share of the steps", float(share), above=0)
    except ValueError:
        raise ValueError(f"the share of the steps must be above 0, not {share!r}") from None
    path = local_path("CONVERTED", directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is no converted run: there is no {path}")
    was = read_json(path)
    if "model_type" in was:
        raise ValueError(
            f"{directory} is a directory of the hub, which does not say how it was trained: give "
            f"another config, such as own_language_model, with --config.init_from={directory}"
        )
    # What is newer than the run is as it is by default.
    fields = {
        name: value | was.get(name, {}) if isinstance(value, dict) else was.get(name, value)
        for name, value in base_config().to_dict().items()
    }
    train = fields["train"]
    steps = max(1, round(alpha * train["steps"]))
    warmup_steps = round(WARMUP * steps)
    every = {
        name: max(1, round(alpha * train[name]))
        for name in ("log_every", "evaluate_every", "checkpoint_every")
    }
    if train["best"]:  # A checkpoint of each evaluation, which rounding alone may not leave.
        each = train["evaluate_every"] // train["checkpoint_every"]
        every["evaluate_every"] = each * every["checkpoint_every"]
    if not was.get("init_from"):
        # Prepared anew: that directory's is data with a tokenizer of its own, not with a given one.
        fields["data"] = fields["data"] | dict(dir="")
    # Of the optimizer there is nothing to continue, though the run itself may have begun so.
    fields |= dict(init_from=directory, init_optimizer="fresh")
    fields["train"] = train | dict(
        every,
        steps=steps,
        learning_rate=RATE * train["learning_rate"],
        hold_steps=max(train["hold_steps"], train["steps"]),
        warmup_steps=warmup_steps,
        decay_steps=steps - warmup_steps,
    )
    return ConfigDict(fields)
