"""What a directory says of how its model is decoded."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mqa_jax.core.checks import check_number
from mqa_jax.hub.files import CONFIG, GENERATION, Directory
from mqa_jax.hub.keys import Keys

# Those that are looked for in `config.json` too, whichever of the files there are.
_IDS = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id")


@dataclasses.dataclass(frozen=True)
class Generation:
    """The defaults of a directory that change what is decoded; None: it says nothing.

    Nothing obeys them by itself: who decodes chooses the search, and takes from here what it needs.

    Attributes:
      eos_ids: the ids that end a text, any of them.
      bos_id: what a text begins with, where the tokenizer puts it there.
      pad_id: of padding.
      decoder_start_id: what an encoder-decoder's target begins with.
      forced_bos_id: the first id of a target, whatever the model says.
      forced_eos_id: likewise the last, at the longest length.
      bad_words: sequences of ids that are not decoded.
      suppressed: ids that are not decoded.
      max_length: tokens in all, the prompt of a language model among them.
      max_new_tokens: tokens behind the prompt.
      min_length: likewise in all, at least.
      min_new_tokens: behind the prompt, at least.
      num_beams: 1 is no beam search.
      length_penalty: hypotheses are ranked by log-probability / length ** length_penalty.
      early_stopping: True, False or "never".
      renormalize: probabilities sum to one again once ids are forbidden.
      do_sample: draw, in place of taking the most probable.
      temperature: by which logits are divided before that.
      top_k: as many ids are drawn from.
      top_p: the probability of those drawn from.
      min_p: likewise the least, as a part of the greatest.
      repetition_penalty: of ids that were there before.
      no_repeat_ngram_size: sequences of that many ids do not come twice.
      unheeded: keys that ask for what there is no field for, and change what is decoded; with
        their values, which `save` writes again.
    """

    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    decoder_start_id: int | None = None
    forced_bos_id: int | None = None
    forced_eos_id: int | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    suppressed: tuple[int, ...] = ()
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    renormalize: bool = False
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    unheeded: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Their keys, of fields that are an id, a number, and so on.
_ONE_ID = dict(
    bos_id="bos_token_id",
    pad_id="pad_token_id",
    decoder_start_id="decoder_start_token_id",
    forced_bos_id="forced_bos_token_id",
    forced_eos_id="forced_eos_token_id",
)
_SOME_IDS = dict(eos_ids="eos_token_id", suppressed="suppress_tokens")
_NO_IDS: tuple[Any, ...] = (None, -1, [])
_COUNTS = (
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens"),
    *("num_beams", "top_k", "no_repeat_ngram_size"),
)
_NUMBERS: dict[str, dict[str, float]] = dict(
    temperature=dict(least=0),
    top_p=dict(least=0, most=1),
    min_p=dict(least=0, most=1),
    repetition_penalty=dict(above=0),
    length_penalty={},
)
_FLAGS = dict(renormalize="renormalize_logits", do_sample="do_sample")
# What they are where they ask for nothing, beside null, an empty list and false.
_UNKNOWN: dict[str, float | None] = dict(
    begin_suppress_tokens=None,
    constraints=None,
    diversity_penalty=0.0,
    dola_layers=None,
    encoder_no_repeat_ngram_size=0,
    encoder_repetition_penalty=1.0,
    epsilon_cutoff=0.0,
    eta_cutoff=0.0,
    exponential_decay_length_penalty=None,
    force_words_ids=None,
    guidance_scale=1.0,
    max_time=None,
    num_beam_groups=1,
    num_return_sequences=1,
    penalty_alpha=0.0,
    sequence_bias=None,
    stop_strings=None,
    token_healing=None,
    top_h=None,
    typical_p=1.0,
    watermarking_config=None,
)


def read_generation(files: Directory, vocab_size: int, is_translation: bool) -> Generation:
    """The defaults of a directory: those of `generation_config.json`, or of `config.json` in old
    directories, which do not have the other file.

    Raises:
      ValueError: a value of another kind, or an id that the model does not have.
    """
    values: Mapping[str, Any] = files.config if files.generation is None else files.generation
    where = str(files.path / (CONFIG if files.generation is None else GENERATION))
    values = {key: files.config.get(key) for key in _IDS} | {
        key: value for key, value in values.items() if value is not None
    }
    # What an encoder-decoder's target begins with, where nothing else is said.
    if is_translation and values["decoder_start_token_id"] in _NO_IDS:
        bos = values["bos_token_id"]
        values["decoder_start_token_id"] = values["pad_token_id"] if bos in _NO_IDS else bos
    keys = Keys(values, where)
    fields: dict[str, Any] = {}
    for field, key in _ONE_ID.items():
        # A class's own ids, left in the files of a smaller model; nothing is decoded with them.
        is_idle = field in ("bos_id", "pad_id") and type(keys.get(key)) is int
        if is_idle and keys.get(key) >= vocab_size:
            continue
        if keys.get(key) not in _NO_IDS:
            fields[field], *others = _ids(keys, key, keys.get(key), vocab_size)
            if others:
                raise keys.refused(key, "of which only one is known what to do with")
    for field, key in _SOME_IDS.items():
        if keys.get(key) not in _NO_IDS:
            fields[field] = _ids(keys, key, keys.get(key), vocab_size)
    if "bad_words_ids" in keys:
        words = keys.get("bad_words_ids")
        if not isinstance(words, list):
            raise keys.refused("bad_words_ids", "not a list of lists of ids")
        fields["bad_words"] = tuple(_ids(keys, "bad_words_ids", w, vocab_size) for w in words)
    fields |= {key: keys.integer(key, least=0) for key in _COUNTS if key in keys}
    for key, limits in _NUMBERS.items():
        if key in keys:
            fields[key] = check_number(f"{where}: {key}", keys.get(key), **limits)
    fields |= {field: keys.flag(key, False) for field, key in _FLAGS.items()}
    if "early_stopping" in keys:
        early_stopping = keys.get("early_stopping")
        if not isinstance(early_stopping, bool) and early_stopping != "never":
            raise keys.refused("early_stopping", 'not true, false or "never"')
        fields["early_stopping"] = early_stopping
    fields["unheeded"] = {
        key: value
        for key, nothing in _UNKNOWN.items()
        if (value := keys.get(key)) not in (None, [], {}, nothing) and value is not False
    }
    return Generation(**fields)


def write_generation(generation: Generation) -> dict[str, Any]:
    """The keys of `generation_config.json`, of all that is not as when nothing is said."""
    words = {**_ONE_ID, **_SOME_IDS, **_FLAGS, "bad_words": "bad_words_ids"}
    written = {}
    for field in dataclasses.fields(generation):
        value = getattr(generation, field.name)
        if field.name != "unheeded" and value != field.default:
            written[words.get(field.name, field.name)] = _listed(value)
    if len(generation.eos_ids) == 1:
        written["eos_token_id"] = generation.eos_ids[0]
    return written | dict(generation.unheeded)


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _ids(keys: Keys, key: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    for id in ids:
        if type(id) is not int or not 0 <= id < vocab_size:
            raise keys.refused(key, f"not an id, or of those, from 0 to {vocab_size - 1}")
    if not ids:
        raise keys.refused(key, "without an id")
    return tuple(ids)
