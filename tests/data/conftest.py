"""Small parallel text, and the config that asks for it."""

import random

import pytest
from ml_collections import ConfigDict

ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
GERMAN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
LINES = dict(train=211, val=13, test=7)


def digits(seed: int, count: int) -> list[list[int]]:
    """`count` numbers of one to five digits."""
    rng = random.Random(seed)
    return [[rng.randrange(10) for _ in range(rng.randint(1, 5))] for _ in range(count)]


@pytest.fixture
def text_dir(tmp_path):
    """A directory with train.en, train.de, val.en, ..., of 211, 13 and 7 lines."""
    directory = tmp_path / "text"
    directory.mkdir()
    for stem, count in LINES.items():
        numbers = digits(count, count)
        for side, words in (("en", ENGLISH), ("de", GERMAN)):
            lines = [" ".join(words[digit] for digit in number) for number in numbers]
            (directory / f"{stem}.{side}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


@pytest.fixture
def config(tmp_path, text_dir):
    """`config.data` for that text, in rows of 37 and 41 tokens."""
    return ConfigDict(
        dict(
            builder="parallel_text",
            path=str(text_dir),
            source="en",
            target="de",
            splits=dict(train="train", validation="val", test="test"),
            dir=str(tmp_path / "prepared"),
            tfds_dir="",
            source_length=37,
            target_length=41,
            pack=True,
            on_invalid="error",
            vocab_size=293,
            subword_samples=0,
            subword_alpha=0.3,
        )
    )
