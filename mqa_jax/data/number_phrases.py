"""`number_phrases`: numbers in English words and in German ones, a dataset without a download.

Small, regular and exactly right or wrong, it shows within minutes on a CPU whether a model learns
to translate. The words come from the `num2words` library.

    from mqa_jax.data.number_phrases import NumberPhrases
    builder = NumberPhrases(data_dir=directory, file_format="array_record")
    builder.download_and_prepare()
    builder.as_data_source("train")[0]  # {"en": b"ninety-two", "de": b"zweiundneunzig"}
"""

import copy
import dataclasses
import functools
import hashlib
import random
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import tensorflow_datasets as tfds
from num2words import CONVERTER_CLASSES

Phrase = tuple[str, str]

# What num2words also offers is wrong in one of the languages: it knows no English for marks, and
# makes one hundredth of a yuan a jiao, which is a tenth.
CURRENCIES = ("EUR", "GBP", "USD")

# Above all numbers that are drawn.
LARGE = 10**6

# One phrase in 62 is for validation and one for the test: about a thousand each.
HELD_OUT = 62


def cardinal(number: int) -> Phrase:
    """21 -> ("twenty-one", "einundzwanzig")."""
    return _words("en", "cardinal", number), _german("cardinal", number)


def ordinal(number: int) -> Phrase:
    """21 -> ("twenty-first", "einundzwanzigste")."""
    return _words("en", "ordinal", number), _german("ordinal", number)


def year(number: int) -> Phrase:
    """1984 -> ("nineteen eighty-four", "neunzehnhundertvierundachtzig"); from 1000 to 2099."""
    return _words("en", "year", number), _german("year", number)


def currency(amount: Decimal, code: str) -> Phrase:
    """2.01, "USD" -> ("two dollars, one cent", "zwei Dollar und ein Cent")."""
    return (
        _words("en", "currency", amount, currency=code),
        _german("currency", amount, currency=code),
    )


def decimal(number: Decimal) -> Phrase:
    """1.05 -> ("one point zero five", "eins Komma null fünf")."""
    return _words("en", "cardinal", number), _german("cardinal", number)


def _german(form: str, number: int | Decimal, **options: str) -> str:
    # 101,000 is "einhunderteintausend"; num2words leaves an s in the middle.
    return _words("de", form, number, **options).replace("einstausend", "eintausend")


def _words(language: str, form: str, number: int | Decimal, **options: str) -> str:
    converter = _of_small(language) if number < LARGE else CONVERTER_CLASSES[language]
    return getattr(converter, f"to_{form}")(number, **options)


@functools.cache
def _of_small(language: str) -> Any:
    """What num2words converts with, and of its words those alone that small numbers have.

    At each part of a number it looks through all of them, and most are for numbers of hundreds of
    digits: five sixths of the time that the phrases would take.
    """
    converter = copy.copy(CONVERTER_CLASSES[language])
    cards = converter.cards.items()
    converter.cards = {value: word for value, word in cards if value < LARGE}
    return converter


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of phrase.

    Attributes:
      count: how many different numbers are drawn.
      draw: from a source of randomness to the arguments of `phrase`.
      phrase: from a number to its English and German words.
    """

    count: int
    draw: Callable[[random.Random], tuple]
    phrase: Callable[..., Phrase]


def _integer(rng: random.Random, digits: int) -> int:
    """A number of up to `digits` digits, one as likely as two as three: small ones are common."""
    return int(rng.random() * 10 ** (1 + int(rng.random() * digits)))


def _draw_currency(rng: random.Random) -> tuple[Decimal, str]:
    # Nobody says "zero dollars" or "zero cents" when there is something beside it.
    units = 1 + _integer(rng, 4)
    cents = 1 + int(rng.random() * 99)
    return Decimal(100 * units + cents) / 100, CURRENCIES[int(rng.random() * len(CURRENCIES))]


def _draw_decimal(rng: random.Random) -> tuple[Decimal]:
    places = 1 + int(rng.random() * 3)
    # A last digit of zero is not pronounced, so it would be the same number twice.
    fraction = 10 * int(rng.random() * 10 ** (places - 1)) + 1 + int(rng.random() * 9)
    return (_integer(rng, 4) + Decimal(fraction).scaleb(-places),)


KINDS = {
    "cardinal": Kind(24_000, lambda rng: (_integer(rng, 6),), cardinal),
    "ordinal": Kind(12_000, lambda rng: (_integer(rng, 6),), ordinal),
    "year": Kind(1_100, lambda rng: (1000 + int(rng.random() * 1100),), year),
    "currency": Kind(15_000, _draw_currency, currency),
    "decimal": Kind(10_000, _draw_decimal, decimal),
}


@functools.cache
def phrases() -> dict[str, str]:
    """Every English phrase and its German one, about 62,000, the same on every machine.

    Raises:
      ValueError: two kinds give one English phrase two German ones.
    """
    german: dict[str, str] = {}
    for kind in KINDS.values():
        # Of all generators, only `random()` promises the same numbers from one Python to the next.
        rng = random.Random(0)
        drawn: dict[tuple, None] = {}
        while len(drawn) < kind.count:
            drawn[kind.draw(rng)] = None
        for numbers in drawn:
            en, de = kind.phrase(*numbers)
            if german.setdefault(en, de) != de:
                raise ValueError(f"{en!r} has two translations, {german[en]!r} and {de!r}")
    return german


def split_of(english: str) -> str:
    """The one split that a phrase is in, told by the phrase alone."""
    bucket = int.from_bytes(hashlib.sha256(english.encode()).digest()[:8], "big") % HELD_OUT
    return {0: "validation", 1: "test"}.get(bucket, "train")


class NumberPhrases(tfds.core.GeneratorBasedBuilder):
    """Numbers in English words and in German words."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Numbers in English words and the same in German words, by num2words.",
            features=tfds.features.FeaturesDict(
                {"en": tfds.features.Text(), "de": tfds.features.Text()}
            ),
            supervised_keys=("en", "de"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # there is nothing to download
        return {split: self._generate_examples(split) for split in ("train", "validation", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, str]]]:
        for en, de in phrases().items():
            if split_of(en) == split:
                yield en, {"en": en, "de": de}
