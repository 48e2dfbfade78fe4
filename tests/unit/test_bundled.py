"""The general checkpoints that come with the program: one of each family, sound, and of use on KPIs never seen."""

import dataclasses

import numpy as np
import pytest

from models import repository
from models.families import NAMES
from stream import backtest
from stream.report import summarise
from stream.sample import generate
from stream.service import detector_factory, use_one_thread
from stream.settings import load_settings

START_MS = 1_767_571_200_000


@pytest.mark.parametrize("name", NAMES)
def test_a_general_checkpoint_of_each_family_is_there_and_says_what_it_is(name: str) -> None:
    found = repository.load(repository.bundled_root(), name)
    assert found.model.family == name and found.model.features == 1
    assert found.model.config.scaling == "window" and not found.calibrated
    assert len(found.calibrations[0]) > 10_000, "a prior needs scores"
    card = (found.path / "card.md").read_text()
    assert "for KPIs it has never seen" in card and "tocsin train --generated" in card
    assert sum(file.stat().st_size for file in found.path.iterdir()) < 2e6


@pytest.mark.parametrize("name", NAMES)
def test_it_scores_a_new_kpi_from_its_first_full_window_and_finds_what_is_gross(name: str) -> None:
    use_one_thread()
    settings = load_settings({"TOCSIN_CHECKPOINT": name})
    detector = detector_factory(settings)()
    clean = generate(3, 300, 5, START_MS, clean=True)
    value, label = clean.value.copy(), np.zeros(len(clean.value), np.bool_)
    spikes = [500, 600, 700]
    value[spikes] += 12 * np.nanstd(value)
    label[spikes] = True
    points = backtest.sample_points([dataclasses.replace(clean, value=value, label=label)])
    events, first = [], None
    for _, result in backtest.run(detector, points, want_scores=True):
        events += result.events
        for part in result.scores:
            if first is None and np.isfinite(part.score).any():
                first = int(part.timestamp_ms[np.isfinite(part.score)][0])
    history = detector.groups[0].model.history
    assert first is not None and first <= START_MS + (history + 8) * 300_000
    found = summarise(points, events, detector.counts, elapsed_s=1.0)
    assert found.caught == 3, [segment for segment in found.segments if segment.incident is None]
    assert found.false_alarms is not None and found.false_alarms <= 3
