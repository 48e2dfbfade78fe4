"""Arrays that get more rows: what was there stays, what is behind it is fresh, and what was outgrown goes back."""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from models.arrays import enough, grown


@pytest.mark.parametrize("fresh", [0, -1.5, np.nan, np.inf])
@pytest.mark.parametrize("rows", [5, 400_000])  # on the heap, in pages of its own
def test_rows_stay_and_those_behind_them_are_fresh(rows: int, fresh: float) -> None:
    before = np.arange(10, dtype=np.float32).reshape(5, 2)
    after = grown(before, rows, fresh)
    assert after.shape == (rows, 2) and after.dtype == np.float32
    np.testing.assert_array_equal(after[:5], before)
    np.testing.assert_array_equal(after[5:], np.full((rows - 5, 2), fresh, np.float32))
    after[:] = 7  # it may be written to
    assert before[1, 0] == 2


def test_an_array_of_no_rows_grows() -> None:
    assert grown(np.zeros((0, 3), np.bool_), 2).tolist() == [[False] * 3] * 2


def test_room_grows_by_a_sixteenth_at_least() -> None:
    assert enough(1, 0) == 64
    assert enough(1_001, 1_000) == 1_062
    assert enough(5_000, 1_000) == 5_000


def test_what_was_outgrown_goes_back_to_the_system() -> None:
    """Arrays of many widths that grow in turn, as those of a detector do, leave holes on a heap."""
    process, widths = psutil.Process(), [512, 480, 512, *[8] * 40]  # bytes of a KPI
    arrays = [np.zeros((0, width), np.uint8) for width in widths]
    before = process.memory_info().rss
    for rows in range(5_000, 100_001, 5_000):
        arrays = [grown(array, rows, 1) for array in arrays]
        np.ones((5_000, 120)).sum()  # a batch
    more = process.memory_info().rss - before
    assert more < 1.1 * sum(array.nbytes for array in arrays)
