"""The claim on NAB, by the very bench that prints it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream.service import use_one_thread
from tests.bench.nab import PUBLISHED, corpus, maker, row, score, settings_of

pytestmark = [pytest.mark.data, pytest.mark.slow]


@pytest.mark.timeout(900)
def test_neighbours_beat_the_htm_of_numenta(data_dir: Path) -> None:
    use_one_thread()
    settings = settings_of()
    series = corpus(data_dir / "nab")
    assert len(series) == 36
    makes = maker("neighbours", settings)
    total, _, caught, windows, false = row((one, score(one, makes(one), settings)) for one in series)
    assert total > PUBLISHED["Numenta HTM"], f"{caught} of {windows} windows, {false} false detections"
