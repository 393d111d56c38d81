import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mqa_jax.data import packing
from mqa_jax.data.packing import pack, to_tokens

S, T = 11, 13


def sentences(length):
    """Ending in EOS, with all lengths alike likely."""
    return st.integers(0, length - 1).flatmap(
        lambda n: st.lists(st.integers(3, 99), min_size=n, max_size=n).map(lambda ids: [*ids, 2])
    )


PAIRS = st.lists(st.tuples(sentences(S), sentences(T)), max_size=40)
LM_PAIRS = st.lists(st.tuples(st.just([]), sentences(T)), max_size=40)


def sizes(rows):
    return [(sum(len(s) for s, _ in row), sum(len(t) for _, t in row)) for row in rows]


@settings(deadline=None)
@given(st.one_of(st.tuples(PAIRS, st.just(S)), st.tuples(LM_PAIRS, st.just(0))), st.integers(1, 5))
def test_every_pair_is_packed_whole_and_once(case, open_rows):
    pairs, source_length = case
    tagged = [(tuple(source), (*target, 1000 + i)) for i, (source, target) in enumerate(pairs)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "OPEN_ROWS", open_rows)
        rows = list(pack(tagged, source_length, T + 1))
        assert rows == list(pack(iter(tagged), source_length, T + 1))
    assert sorted(pair for row in rows for pair in row) == sorted(tagged)
    assert all(source <= source_length and target <= T + 1 for source, target in sizes(rows))
    assert all(rows)


@settings(deadline=None)
@given(PAIRS)
def test_no_two_rows_fit_into_one(pairs):
    """With all rows open, first fit leaves no row whose pairs had room in an earlier one."""
    rows = list(pack(pairs, S, T))
    totals = sizes(rows)
    for i, (source, target) in enumerate(totals):
        for later in rows[i + 1 :]:
            assert source + len(later[0][0]) > S or target + len(later[0][1]) > T


def test_first_fit_by_hand():
    a, b, c, d = ([5] * 6, [6] * 2), ([5] * 6, [7] * 2), ([5] * 5, [8] * 9), ([5] * 5, [9] * 11)
    assert list(pack([a, b, c, d], 11, 13)) == [[a, c], [b, d]]


def test_the_fullest_row_is_closed_first(monkeypatch):
    monkeypatch.setattr(packing, "OPEN_ROWS", 2)
    a, b, c = ([5] * 6, [6] * 8), ([5] * 1, [6] * 12), ([5] * 6, [7] * 2)
    # b has room for one more target token only, though it has more room than a in all.
    assert list(pack([a, b, c], 11, 13)) == [[b], [a], [c]]


def test_rows_are_streamed(monkeypatch):
    monkeypatch.setattr(packing, "OPEN_ROWS", 3)
    read = []

    def pairs():
        for i in range(100):
            read.append(i)
            yield [5] * 11, [6] * 13

    rows = pack(pairs(), 11, 13)
    next(rows)
    assert len(read) == 4


@pytest.mark.parametrize("source, target", [(12, 3), (3, 14)])
def test_a_pair_longer_than_a_row_is_refused(source, target):
    with pytest.raises(ValueError, match=f"{source} source and {target} target .* 11 and 13"):
        list(pack([([5] * source, [6] * target)], 11, 13))


def test_a_source_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="1 source"):
        list(pack([([5], [6])], 0, 13))


def test_tokens_of_a_row():
    row = [([11, 12, 2], [21, 2]), ([13, 2], [22, 23, 24, 2])]
    tokens = to_tokens(row, 7, 8)
    assert tokens.tolist() == [11, 12, 2, 13, 2, 0, 0, 21, 2, 22, 23, 24, 2, 0, 0]
    assert tokens.dtype == np.int32
    assert to_tokens([([], [21, 22, 2])], 0, 3).tolist() == [21, 22, 2]
    assert to_tokens([], 2, 3).tolist() == [0] * 5


@pytest.mark.parametrize(
    "row, reason",
    [
        ([([5] * 5 + [2], [6, 2])], "6 source tokens do not fit into a row of 5"),
        ([([5, 2], [6, 2]), ([5, 2], [7, 2])], "4 target tokens do not fit into a row of 3"),
        ([([], [6, 2])], r"the sentence \[\] must end in EOS"),
        ([([5, 6], [6, 2])], r"the sentence \[5, 6\] must end in EOS \(2\)"),
        ([([5, 2], [2, 2])], r"the sentence \[2, 2\] must end in EOS"),
        ([([5, 0, 2], [6, 2])], r"the sentence \[5, 0, 2\] .* PAD \(0\) must be nowhere else"),
    ],
    ids=str,
)
def test_a_row_that_could_not_be_read_again_is_refused(row, reason):
    with pytest.raises(ValueError, match=reason):
        to_tokens(row, 5, 3)
