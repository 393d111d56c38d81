"""Numbers are what they are asked to be, and come back as plain ones."""

import math

import numpy as np
import pytest

from mqa_jax.core.checks import check_integer, check_number


@pytest.mark.parametrize("value", [3, np.int32(3), np.int64(3), np.array(3)])
def test_integers_come_back_plain(value):
    number = check_integer("x", value, least=3, most=3)
    assert type(number) is int and number == 3


@pytest.mark.parametrize(
    "value",
    [True, np.True_, np.array(True), 3.0, "3", None, math.nan, [3], np.array([3])],
)
def test_what_is_no_integer(value):
    with pytest.raises(ValueError, match="x must be an integer, not"):
        check_integer("x", value)


def test_integers_out_of_range():
    with pytest.raises(ValueError, match="x must be at least 1, not 0"):
        check_integer("x", 0)
    for value in (1, 6):
        with pytest.raises(ValueError, match=f"x must be from 2 to 5, not {value}"):
            check_integer("x", value, least=2, most=5)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), np.array(0.5)])
def test_numbers_come_back_plain(value):
    number = check_number("x", value, least=0, below=1)
    assert type(number) is float and number == value


@pytest.mark.parametrize(
    "value",
    [True, np.True_, np.array(True), "0.5", b"1", b"a", None, math.nan, math.inf, -math.inf, [1.0]]
    + [np.array([0.5]), 1j],
)
def test_what_is_no_finite_number(value):
    with pytest.raises(ValueError, match="x must be a finite number, not"):
        check_number("x", value)


@pytest.mark.parametrize(
    ("limits", "value", "words"),
    [
        (dict(above=0), 0, "above 0"),
        (dict(least=0), -1e-9, "at least 0"),
        (dict(least=0, below=1), 1, "at least 0, below 1"),
        (dict(above=0, most=1), 1.5, "above 0, at most 1"),
    ],
)
def test_numbers_out_of_range(limits, value, words):
    with pytest.raises(ValueError, match=f"x must be a finite number, {words}, not {value}"):
        check_number("x", value, **limits)
