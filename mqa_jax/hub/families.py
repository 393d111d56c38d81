"""Which family a `config.json` is of, and the model that it describes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mqa_jax.hub.decoders import DECODERS
from mqa_jax.hub.family import MOST_LAYERS, MOST_UNITS, Family, Fields
from mqa_jax.hub.keys import Keys
from mqa_jax.hub.translators import TRANSLATORS
from mqa_jax.model.config import TransformerConfig

FAMILIES: Mapping[str, Family] = {f.model_type: f for f in (*DECODERS, *TRANSLATORS)}

# The heads that end in a softmax over the vocabulary; old ones of T5 and Falcon among them.
_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel")

# Our keys for key/value heads that a family has no words for. Where there is none the heads are the
# family's own, and so are those of each part without one.
_KV_HEADS = dict(
    num_kv_heads="num_key_value_heads",
    encoder_kv_heads="encoder_key_value_heads",
    cross_kv_heads="cross_key_value_heads",
)

# Where a directory says that its weights are in eight bits, and who has written it so.
QUANTIZED, OWN_METHOD = "quantization_config", "mqa_jax"

# What of a model its checkpoint does not say.
_OWN_FIELDS = [
    "dtype",
    "param_dtype",
    "cache_dtype",
    "remat",
    "dropout_rate",
    "attention_dropout_rate",
    "relu_dropout_rate",
]


def family_named(name: str) -> Family:
    """A family by its `model_type`.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in FAMILIES:
        raise ValueError(f"{name!r} is not a supported model type: {', '.join(FAMILIES)} are")
    return FAMILIES[name]


def read_options(config: Mapping[str, Any], where: str) -> tuple[Family, Fields]:
    """The family of a `config.json`, and the fields of `TransformerConfig` that it asks for.

    Args:
      config: as it was read.
      where: what errors call it.

    Raises:
      ValueError: something that is not supported, or no value that a model can have; the message
        has the key.
    """
    keys = Keys(config, where)
    if "model_type" not in keys:
        of_run = ": it is of a training run (--workdir)" if "task" in keys else ""
        raise ValueError(f"{where}: model_type is missing, which says what family it is of{of_run}")
    if (name := keys.text("model_type")) not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise keys.refused("model_type", f"which is not supported: {known} are")
    eight_bits = _eight_bits(config[QUANTIZED], where) if QUANTIZED in keys else {}
    architectures = keys.get("architectures", [])
    if not isinstance(architectures, list) or not all(
        isinstance(name, str) and name.endswith(_HEADS) for name in architectures
    ):
        raise keys.refused(
            "architectures",
            f"but only models with a language model's head are read: {', '.join(_HEADS)}",
        )
    family = FAMILIES[name]
    keys.only(family.only, "only this is supported:")
    sizes = {
        field: keys.integer(key, most=MOST_LAYERS if "layers" in field else MOST_UNITS)
        for field, key in family.sizes.items()
    }
    is_tied = keys.flag("tie_word_embeddings", family.is_tied)
    fields: Fields = dict(tied_softmax=is_tied, logits_scale=1.0)
    fields |= sizes | family.read(keys, sizes)
    return family, fields | _kv_heads(family, keys, fields["num_kv_heads"]) | eight_bits


def _eight_bits(found: Any, where: str) -> Fields:
    """What our own `quantization_config` says."""
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method != OWN_METHOD:
        raise ValueError(
            f"{where} has a quantization_config of the method {method!r}: of quantized checkpoints "
            "only those that mqa_jax has written are read; take the one that this was made from, "
            "with weights in bfloat16, float16 or float32"
        )
    fields = {name: value for name, value in found.items() if name != "quant_method"}
    if set(fields) != {"quantized", "cache_dtype"}:
        raise ValueError(f"{where}: {QUANTIZED} has the keys {sorted(found)}, which are not ours")
    return fields


def _kv_heads(family: Family, keys: Keys, had: int) -> Fields:
    """What our own keys say; nothing where there are none."""
    names = _keys_of_heads(family)
    if not any(key in keys for key in names.values()):
        return {}
    return {field: keys.integer(key, had, most=MOST_UNITS) for field, key in names.items()}


def _keys_of_heads(family: Family) -> dict[str, str]:
    """Those of `_KV_HEADS` of parts that the family's models have."""
    is_translation = family.task == "translation"
    return {f: key for f, key in _KV_HEADS.items() if is_translation or f == "num_kv_heads"}


def write_options(family: Family, config: TransformerConfig) -> Fields:
    """The `config.json` of a model, without the ids of its tokens; its keys are of version 4.

    Raises:
      ValueError: the family has no key for something that the model does.
    """
    wanted = _resolved(family, config)
    written = {key: wanted[field] for field, key in family.sizes.items()}
    written |= dict(
        model_type=family.model_type,
        architectures=[family.architecture],
        torch_dtype=config.param_dtype,
        tie_word_embeddings=wanted["tied_softmax"],
    )
    if config.quantized is not None:
        eight_bits = dict(quantized=config.quantized, cache_dtype=config.cache_dtype)
        written[QUANTIZED] = dict(quant_method=OWN_METHOD) | eight_bits
    written |= family.write(dataclasses.replace(config, **wanted))
    try:
        read = _read_again(family, written)
        heads = _keys_of_heads(family).items()
        if own := {key: wanted[field] for field, key in heads if wanted[field] != read[field]}:
            written |= own
            read = _read_again(family, written)
    except ValueError as error:
        raise ValueError(f"this model cannot be a {family.model_type}: {error}") from None
    # What a T5 does not say: it has no longest length; which softmax it has, its tensors tell.
    told = set(wanted) - {"tied_softmax"} - ({"max_length"} - set(family.sizes))
    if lacking := [name for name in wanted if name in told and wanted[name] != read[name]]:
        raise ValueError(
            f"a checkpoint of {family.model_type} cannot say "
            + ", ".join(f"{name}={wanted[name]!r}" for name in lacking)
            + f" (it would be {', '.join(f'{read[name]!r}' for name in lacking)}): save it as "
            f"another of {', '.join(FAMILIES)}, or keep it in a checkpoint of mqa_jax"
        )
    return written


def _read_again(family: Family, written: Fields) -> Fields:
    _, fields = read_options(written, "config.json")
    return _resolved(family, TransformerConfig(**fields))


def _resolved(family: Family, config: TransformerConfig) -> Fields:
    """The fields that make a checkpoint, with what None stands for in its place."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    fields = {name: value for name, value in fields.items() if name not in _OWN_FIELDS}
    is_translation = family.task == "translation"
    is_tied = is_translation if config.tied_softmax is None else config.tied_softmax
    none = dict(
        num_encoder_layers=config.num_layers,
        encoder_kv_heads=config.num_kv_heads,
        cross_kv_heads=config.num_kv_heads,
        attention_scale=config.head_dim**-0.5,
        tied_softmax=is_tied,
        logits_scale=config.d_model**-0.5 if is_tied else 1.0,
    )
    fields |= {name: value for name, value in none.items() if fields[name] is None}
    fields["bias"] = tuple(sorted(config.bias))
    if isinstance(config.window, tuple) and len(set(config.window)) == 1:
        fields["window"] = config.window[0]
    return fields
