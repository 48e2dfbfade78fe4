"""Generated KPIs: the same for a seed, readable, plausible, and with anomalies that deserve their label."""

import io
from pathlib import Path

import numpy as np
import pytest

from stream.csvfile import read_table
from stream.errors import ConfigError
from stream.sample import KINDS, WARM_UP, Sample, generate, random_kpi, write_csv

START = 1_717_372_800_000  # Monday, 2024-06-03 00:00 UTC
DAY = 86_400_000
SEEDS = range(6)


def text(sample: Sample) -> str:
    file = io.StringIO()
    write_csv(sample, file)
    return file.getvalue()


@pytest.fixture(scope="module", params=KINDS)
def sample(request: pytest.FixtureRequest) -> Sample:
    return generate(28, 300, 1, START, kind=request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_bytes(kind: str) -> None:
    one, again, other = (text(generate(5, 300, seed, START, kind=kind)) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_the_form_of_the_file() -> None:
    lines = text(generate(28, 300, 1, START)).splitlines()
    assert lines[0] == "timestamp,value,label"
    assert lines[1].split(",")[0] == str(START // 1000)
    assert {line.split(",")[2] for line in lines[1:]} == {"0", "1"}


def test_written_and_read_back(tmp_path: Path, sample: Sample) -> None:
    path = tmp_path / "x.csv"
    with path.open("w") as file:
        write_csv(sample, file)
    table = read_table(path)
    assert table.n_refused == 0
    np.testing.assert_array_equal(table.timestamp_ms, sample.timestamp_ms)
    np.testing.assert_array_equal(table.value, sample.value)
    np.testing.assert_array_equal(table.label == 1, sample.label)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 7.3e4, 1e9])
def test_six_digits_at_any_scale(tmp_path: Path, scale: float) -> None:
    made = generate(3, 60, 5, START, kind="latency", scale=scale)
    assert [float(f"{value:.6g}") for value in made.value.tolist()] == made.value.tolist()


def test_points_lie_on_the_grid_and_in_the_bounds(sample: Sample) -> None:
    steps = np.diff(sample.timestamp_ms)
    assert (steps > 0).all()
    assert (steps % 300_000 == 0).all()
    assert (sample.timestamp_ms[0], sample.timestamp_ms[-1]) == (START, START + 28 * DAY - 300_000)
    assert np.isfinite(sample.value).all()
    assert sample.value.min() >= 0
    if sample.kind == "cpu":
        assert sample.value.max() <= 100
    if sample.kind in ("errors", "queue"):
        assert (sample.value % 1 == 0).all()


def test_the_labels_are_the_segments(sample: Sample) -> None:
    label = np.zeros(len(sample.label), np.bool_)
    for segment in sample.segments:
        inside = (sample.timestamp_ms >= segment.start_ms) & (sample.timestamp_ms <= segment.end_ms)
        assert inside.sum() == (segment.end_ms - segment.start_ms) // 300_000 + 1  # no point of an anomaly is missing
        label |= inside
    np.testing.assert_array_equal(label, sample.label)
    edges = [edge for segment in sample.segments for edge in (segment.start_ms, segment.end_ms)]
    assert edges == sorted(edges)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interval_s", [60, 300, 600])
def test_how_many_anomalies_and_where(kind: str, interval_s: int, seed: int) -> None:
    made = generate(28, interval_s, seed, START, kind=kind)
    assert 8 <= len(made.segments) <= 12
    assert 0.004 < made.label.mean() < 0.025
    assert made.segments[0].start_ms >= START + WARM_UP * 28 * DAY
    assert sum(segment.subtle for segment in made.segments) == 2
    if kind in ("requests", "cpu", "memory"):
        assert {segment.kind for segment in made.segments} == {
            "spike_up", "spike_down", "dip", "level_shift", "slow_burn", "noise_burst"
        }  # fmt: skip


def test_silence_has_no_rows(sample: Sample) -> None:
    (silence,) = sample.silences
    assert silence.kind == "silence"
    inside = (sample.timestamp_ms >= silence.start_ms) & (sample.timestamp_ms <= silence.end_ms)
    assert not inside.any()
    assert 2.9 <= (silence.end_ms - silence.start_ms) / 3_600_000 <= 7.1
    assert silence.start_ms >= START + WARM_UP * 28 * DAY
    assert np.diff(sample.timestamp_ms).max() >= silence.end_ms - silence.start_ms


def test_a_few_points_are_missing(sample: Sample) -> None:
    (silence,) = sample.silences
    silent = (silence.end_ms - silence.start_ms) // 300_000 + 1
    missing = 28 * 288 - len(sample.value) - silent
    assert 0.003 < missing / (28 * 288) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_clean_is_the_same_kpi_without_anomalies(kind: str) -> None:
    made, clean = (generate(28, 300, 3, START, kind=kind, clean=flag) for flag in (False, True))
    assert not clean.label.any()
    assert clean.segments == clean.silences == ()
    _, a, b = np.intersect1d(made.timestamp_ms, clean.timestamp_ms, return_indices=True)
    normal = ~made.label[a]
    np.testing.assert_array_equal(made.value[a][normal], clean.value[b][normal])


@pytest.mark.parametrize("kind", KINDS)
def test_clear_anomalies_stand_out(kind: str) -> None:
    """Against the same KPI without them, in units of its usual step from point to point."""
    found = []
    for seed in SEEDS:
        made, clean = (generate(28, 300, seed, START, kind=kind, clean=flag) for flag in (False, True))
        noise = np.median(np.abs(np.diff(clean.value, 2))) / 1.65 + 1e-9  # std of white noise from second differences
        normal = np.interp(made.timestamp_ms, clean.timestamp_ms, clean.value)
        for segment in made.segments:
            inside = (made.timestamp_ms >= segment.start_ms) & (made.timestamp_ms <= segment.end_ms)
            if not segment.subtle:
                found.append(float(np.abs(made.value - normal)[inside].max() / noise))
    assert np.quantile(found, 0.05) > 4


@pytest.mark.parametrize("kind", ["requests", "latency", "cpu"])
def test_day_and_week(kind: str) -> None:
    clean = generate(28, 300, 2, START, kind=kind, clean=True)
    hour = clean.timestamp_ms // 3_600_000 % 24
    weekend = (clean.timestamp_ms - START) // DAY % 7 >= 5
    evening, night = ((hour >= 19) & (hour <= 21), (hour >= 2) & (hour <= 4))
    assert clean.value[evening].mean() > (3 if kind == "requests" else 1.05) * clean.value[night].mean()
    office = (hour >= 9) & (hour <= 17)
    assert clean.value[office & weekend].mean() < 0.98 * clean.value[office & ~weekend].mean()


def test_season_and_noise_can_be_turned_off() -> None:
    flat = generate(14, 300, 2, START, season=0, noise=0, clean=True)
    assert flat.value.std() < 0.1 * flat.value.mean()  # trend and slow walk only
    assert np.abs(np.diff(flat.value)).max() < 0.01 * flat.value.mean()
    loud, calm = (generate(14, 300, 2, START, noise=noise, clean=True).value for noise in (2.0, 0.5))
    assert np.abs(np.diff(loud)).mean() > 2 * np.abs(np.diff(calm)).mean()


def test_scale_is_the_unit() -> None:
    small, large = (generate(7, 300, 2, START, scale=scale).value for scale in (1.0, 1000.0))
    np.testing.assert_allclose(small * 1000, large, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("days", "interval_s"), [(50 / 1440, 60), (1, 600), (0.02, 1), (400, 86_400)])
def test_short_coarse_and_fine_ones(kind: str, days: float, interval_s: int) -> None:
    made = generate(days, interval_s, 4, START, kind=kind)
    assert len(made.segments) >= 2
    assert 0 < made.label.mean() < 0.25 or interval_s == 86_400
    assert np.isfinite(made.value).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "weather"}, "kind 'weather' is unknown; take one of requests"),
        ({"days": 0.01}, "give at least 50 points"),
        ({"days": float("nan")}, "give at least 50 points"),
        ({"interval_s": 0}, "give at least 50 points"),
        ({"start_ms": 1}, "not a whole second"),
        ({"start_ms": -1000}, "not a whole second"),
        ({"scale": 0.0}, "scale=0.0 is not a positive number"),
        ({"noise": -1.0}, "noise=-1.0 is not a positive number"),
        ({"season": float("inf")}, "season=inf is not a positive number"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_arguments_that_are_refused(change: dict[str, float | str], message: str) -> None:
    arguments = {"days": 7, "interval_s": 300, "seed": 1, "start_ms": START} | change
    with pytest.raises(ConfigError, match=message):
        generate(**arguments)  # type: ignore[arg-type]


def test_random_kpis_are_of_all_sorts() -> None:
    made = [random_kpi(seed, days=3) for seed in range(60)]
    assert {kpi.kind for kpi in made} == set(KINDS)
    assert {kpi.interval_s for kpi in made} == {60, 300, 600}
    assert len({kpi.name for kpi in made}) == 60
    sizes = np.array([np.median(kpi.value[kpi.value > 0]) for kpi in made])
    assert sizes.min() < 0.1
    assert sizes.max() > 1e7
    assert all(np.isfinite(kpi.value).all() and kpi.value.std() > 0 for kpi in made)
    assert text(random_kpi(7, days=3)) == text(made[7])
    assert not any(random_kpi(seed, days=3, clean=True).label.any() for seed in range(5))
