"""The rule by which cells of a matrix stay in the fast suite."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, product

from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.matrix import covering, matrix


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_every_pair_is_covered_and_every_member_twice(sizes, data):
    cells = list(product(*(range(size) for size in sizes)))
    cells = data.draw(st.lists(st.sampled_from(cells), unique=True, min_size=1))
    chosen = covering(cells)
    assert set(chosen) <= set(cells)
    assert pairs(chosen) == pairs(cells)
    there, kept = (Counter(member for cell in some for member in enumerate(cell)) for some in (cells, chosen))
    assert all(kept[member] >= min(2, count) for member, count in there.items())


def pairs(cells):
    return {pair for cell in cells for pair in combinations(enumerate(cell), 2)}


AXES = {"size": [1, 2, 3], "color": {"red": 0, "blue": 1}, "word": "abc"}


def test_cells_that_are_not_chosen_are_slow_and_none_is_lost(monkeypatch):
    monkeypatch.setattr("tests.helpers.matrix.EVERY_CELL", True)
    mark = matrix(lambda size, _color, word: word != "c" or size == 1, **AXES)
    names, rows = mark.args
    assert names == ("size", "color", "word")
    assert len(rows) == 2 * (3 * 2 + 1)
    assert rows[0].values == (1, 0, "a")
    assert rows[0].id == "1-red-a"
    fast = [row for row in rows if not row.marks]
    assert 8 <= len(fast) < len(rows)
    assert {row.marks[0].name for row in rows if row.marks} == {"slow"}
    monkeypatch.setattr("tests.helpers.matrix.EVERY_CELL", False)
    assert matrix(lambda size, _color, word: word != "c" or size == 1, **AXES).args[1] == fast
    some = matrix(slow=lambda size, *_: size == 3, **AXES).args[1]
    assert {row.values[0] for row in some} == {1, 2}
