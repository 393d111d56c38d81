import dataclasses
import hashlib
import json
import sys
from decimal import Decimal

import pytest

from mqa_jax.data import number_phrases
from mqa_jax.data.number_phrases import (
    KINDS,
    NumberPhrases,
    cardinal,
    currency,
    decimal,
    ordinal,
    phrases,
    split_of,
    year,
)


@pytest.mark.parametrize(
    "phrase, english, german",
    [
        (cardinal(0), "zero", "null"),
        (cardinal(1), "one", "eins"),
        (cardinal(16), "sixteen", "sechzehn"),
        (cardinal(231), "two hundred and thirty-one", "zweihunderteinunddreißig"),
        (cardinal(101_000), "one hundred and one thousand", "einhunderteintausend"),
        (cardinal(999_001), "nine hundred and ninety-nine thousand and one",
         "neunhundertneunundneunzigtausendeins"),
        (cardinal(999_999),
         "nine hundred and ninety-nine thousand, nine hundred and ninety-nine",
         "neunhundertneunundneunzigtausendneunhundertneunundneunzig"),
        (cardinal(1_000_000), "one million", "eine Million"),
        (cardinal(2 * 10**15), "two quadrillion", "zwei Billiarden"),
        (ordinal(0), "zeroth", "nullte"),
        (ordinal(1), "first", "erste"),
        (ordinal(3), "third", "dritte"),
        (ordinal(7), "seventh", "siebte"),
        (ordinal(8), "eighth", "achte"),
        (ordinal(19), "nineteenth", "neunzehnte"),
        (ordinal(20), "twentieth", "zwanzigste"),
        (ordinal(901_007), "nine hundred and one thousand and seventh",
         "neunhunderteintausendsiebte"),
        (year(1066), "ten sixty-six", "eintausendsechsundsechzig"),
        (year(1800), "eighteen hundred", "achtzehnhundert"),
        (year(1901), "nineteen oh-one", "neunzehnhunderteins"),
        (year(2024), "twenty twenty-four", "zweitausendvierundzwanzig"),
        (currency(Decimal("1.01"), "EUR"), "one euro, one cent", "ein Euro und ein Cent"),
        (currency(Decimal("2.20"), "USD"), "two dollars, twenty cents",
         "zwei Dollar und zwanzig Cent"),
        (currency(Decimal("1.01"), "GBP"), "one pound sterling, one penny",
         "ein Pfund und ein Penny"),
        (currency(Decimal("101.02"), "GBP"), "one hundred and one pounds sterling, two pence",
         "einhundertein Pfund und zwei Pence"),
        (decimal(Decimal("0.5")), "zero point five", "null Komma fünf"),
        (decimal(Decimal("21.01")), "twenty-one point zero one",
         "einundzwanzig Komma null eins"),
    ],
)  # fmt: skip
def test_phrases_are_right(phrase, english, german):
    assert phrase == (english, german)


@pytest.mark.slow
def test_all_kinds_are_there():
    """Each has the words that it alone uses, and small numbers are not rare among them."""
    german = phrases()
    assert 61_500 < len(german) <= sum(kind.count for kind in KINDS.values())
    assert {cardinal(n)[0] for n in range(1000)} <= german.keys()
    assert {year(n)[0] for n in range(1000, 2100)} <= german.keys()
    assert {ordinal(n)[0] for n in range(100)} <= german.keys()
    assert sum(" Komma " in de for de in german.values()) > 9_900
    for code in ("Euro", "Dollar", "Pfund"):
        assert 4_500 < sum(f" {code} " in de for de in german.values()) < 5_500


@pytest.mark.slow
def test_german_is_regular():
    for english, german in phrases().items():
        assert "einstausend" not in german and "einshundert" not in german
        assert "null Cent" not in german and "null Euro" not in german
        assert "\n" not in english + german
        assert (english, german) == (english.strip(), german.strip())


@pytest.mark.slow
def test_splits_are_of_the_right_size():
    counts = {"train": 0, "validation": 0, "test": 0}
    for english in phrases():
        counts[split_of(english)] += 1
    assert 59_000 < counts["train"] < 61_000
    assert 900 < counts["validation"] < 1_100
    assert 900 < counts["test"] < 1_100


def few(monkeypatch):
    kinds = {name: dataclasses.replace(kind, count=97) for name, kind in KINDS.items()}
    monkeypatch.setattr(number_phrases, "KINDS", kinds)


def test_phrases_are_the_same_everywhere(monkeypatch):
    """On every Python, and whatever its hash seed, which is random here."""
    few(monkeypatch)
    text = json.dumps([[en, de, split_of(en)] for en, de in phrases.__wrapped__().items()])
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "edf2ce4719e067ab1b7744c2f6e25bd4d4d6ff25187358791585cc5db7f0d84b"
    )


def test_two_translations_of_one_phrase_are_refused(monkeypatch):
    kind = number_phrases.Kind(2, lambda rng: (int(rng.random() * 9),), lambda n: ("many", str(n)))
    monkeypatch.setattr(number_phrases, "KINDS", {"vague": kind})
    with pytest.raises(ValueError, match="'many' has two translations"):
        phrases.__wrapped__()


@pytest.mark.slow
def test_dataset(tmp_path, monkeypatch):
    few(monkeypatch)
    expected = phrases.__wrapped__()
    monkeypatch.setattr(number_phrases, "phrases", lambda: expected)
    builder = NumberPhrases(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    seen = {}
    for split in ("train", "validation", "test"):
        source = builder.as_data_source(split)
        examples = source.__getitems__(range(len(source)))
        pairs = {example["en"].decode(): example["de"].decode() for example in examples}
        assert len(pairs) == len(examples)
        assert not pairs.keys() & seen.keys()
        assert all(split_of(english) == split for english in pairs)
        seen |= pairs
    assert seen == expected
    assert "tensorflow" not in sys.modules
