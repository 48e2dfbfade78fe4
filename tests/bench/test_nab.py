"""The figure on NAB, by the very bench that prints it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream.service import use_one_thread
from tests.bench.nab import corpus, maker, row, score, settings_of

pytestmark = [pytest.mark.data, pytest.mark.slow]


@pytest.mark.timeout(900)
def test_a_quarter_of_the_files_scores_as_it_did(data_dir: Path) -> None:
    """All of them, minutes of one core, are the bench's: 70.5, above the 66.2 of Numenta's HTM."""
    use_one_thread()
    settings = settings_of()
    series = corpus(data_dir / "nab")
    assert len(series) == 36
    makes = maker("neighbours", settings)
    total, _, caught, windows, false = row((one, score(one, makes(one), settings)) for one in series[1::4])
    assert total == pytest.approx(69.7, abs=1.0), f"{caught} of {windows} windows, {false} false detections"
