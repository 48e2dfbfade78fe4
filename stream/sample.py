"""Made-up KPIs with labelled anomalies: a demo that needs no data, and the diet of a general detector.

Six kinds of KPI, each with its own physics:

requests  seasonal: morning ramp, lunch, evening peak, lower weekends; noise grows with the load
latency   right-skewed, weak season, now and then a slow request
cpu       0..100 %, mean-reverting, a nightly job
errors    small whole numbers near zero
memory    sawtooth: leaks until the garbage collector or a restart
queue     empty most of the time, bursts that drain

All randomness comes from the seed: the same arguments give the same bytes. Base, anomalies and missing points have
streams of their own, so a `clean` sample is the very same KPI without its anomalies.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TextIO, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from stream.errors import ConfigError

Floats: TypeAlias = npt.NDArray[np.float64]

WARM_UP: Final = 0.4  # share of the time that is free of anomalies, so that a detector can learn
_SEGMENTS_A_DAY: Final = 10 / 28
_MIN_POINTS: Final = 50
_BLANK: Final = 0.004  # share of single points that are missing
_RUNS_A_DAY: Final = 0.3  # short runs of missing points
_GONE: Final = 14  # time constants after which nothing is left: e**-14 is 1e-6
_SUBTLE_EVERY: Final = 5  # one segment in five is close to the noise


@dataclass(frozen=True, slots=True)
class Segment:
    """An anomaly, or a silence.

    Attributes:
        kind: spike_up, spike_down, dip, level_shift, slow_burn, noise_burst; or silence.
        start_ms: its first point, milliseconds since 1970 UTC.
        end_ms: its last point, included.
        subtle: True if it is hard to tell from the noise, on purpose.
    """

    kind: str
    start_ms: int
    end_ms: int
    subtle: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """A KPI; a missing point is an absent row.

    Attributes:
        name: of the KPI.
        kind: one of `KINDS`.
        interval_s: seconds between grid points.
        timestamp_ms: (N,) int64, increasing, whole seconds since 1970 UTC in milliseconds.
        value: (N,) float64, finite, six significant digits.
        label: (N,) bool, True = anomalous.
        segments: the labelled anomalies in order of time.
        silences: the hours without a row, which no label can show.
    """

    name: str
    kind: str
    interval_s: int
    timestamp_ms: npt.NDArray[np.int64]
    value: Floats
    label: npt.NDArray[np.bool_]
    segments: tuple[Segment, ...]
    silences: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class _Base:
    """A KPI before its anomalies, in its own unit.

    Attributes:
        expected: (N,) what it would be without noise.
        value: (N,) what it is.
        top: the bound above, if there is one; the bound below is 0.
        whole: True if it counts things.
    """

    expected: Floats
    value: Floats
    top: float = math.inf
    whole: bool = False


@dataclass(frozen=True, slots=True)
class _Kind:
    name: str  # of the KPI in a demo
    scale: float  # of its unit
    make: Callable[[np.random.Generator, Floats, int, float, float], _Base]
    anomalies: tuple[str, ...]  # in order of use; a short sample gets the first ones
    falls: bool  # True: its level shifts and slow burns go down


def generate(
    days: float,
    interval_s: int,
    seed: int,
    start_ms: int,
    *,
    kind: str = "requests",
    scale: float | None = None,
    noise: float = 1.0,
    season: float = 1.0,
    clean: bool = False,
    name: str | None = None,
) -> Sample:
    """Return a realistic KPI with labelled anomalies, all of them in the last 60 % of the time.

    About ten anomalies in 28 days, a little over 1 % of the points: most are clear, one in five is subtle. Single
    points and short runs are missing, and once there are hours of silence.

    Args:
        days: length.
        interval_s: seconds between points.
        seed: the same seed and arguments give the same sample.
        start_ms: first timestamp, whole seconds since 1970 UTC in milliseconds.
        kind: one of `KINDS`.
        scale: the unit of the values; default: a plausible one for the kind.
        noise: strength of the noise, 1 = typical, 0 = none.
        season: strength of the daily and weekly pattern, 1 = typical, 0 = none.
        clean: True leaves anomalies and silence out, and changes nothing else.
        name: of the KPI.

    Raises:
        ConfigError: an unknown kind, fewer than 50 points, a negative seed, a negative or infinite strength, a start
            that is not a whole second.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r} is unknown; take one of {', '.join(KINDS)}")
    if interval_s < 1 or not math.isfinite(days) or days * 86_400 / interval_s < _MIN_POINTS:
        raise ConfigError(f"{days:g} days of one point in {interval_s} s: give at least {_MIN_POINTS} points")
    if seed < 0:
        raise ConfigError(f"seed={seed} is negative; give 0 or more")
    if start_ms < 0 or start_ms % 1000:
        raise ConfigError(f"start_ms={start_ms} is not a whole second since 1970; give a multiple of 1000")
    scale = _KINDS[kind].scale if scale is None else scale
    for word, number in (("scale", scale), ("noise", noise), ("season", season)):
        if not (math.isfinite(number) and number >= 0) or (word == "scale" and number == 0):
            raise ConfigError(f"{word}={number} is not a positive number")

    n = round(days * 86_400 / interval_s)
    base_rng, anomaly_rng, missing_rng = (np.random.default_rng([seed, stream]) for stream in range(3))
    timestamp_ms = start_ms + 1000 * interval_s * np.arange(n, dtype=np.int64)
    base = _KINDS[kind].make(base_rng, timestamp_ms / 86_400_000, interval_s, noise, season)

    value, label = base.value, np.zeros(n, np.bool_)
    spans: list[_Span] = []
    silent = (n, n)
    if not clean:
        value, label, spans, silent = _anomalies(anomaly_rng, base, _KINDS[kind], days, interval_s)
    here = ~_missing(missing_rng, n, days) | label
    here[silent[0] : silent[1]] = False

    def segment(span_kind: str, first: int, end: int, subtle: bool = False) -> Segment:
        return Segment(span_kind, int(timestamp_ms[first]), int(timestamp_ms[end - 1]), subtle)

    return Sample(
        name=_KINDS[kind].name if name is None else name,
        kind=kind,
        interval_s=interval_s,
        timestamp_ms=timestamp_ms[here],
        value=_six_digits(value[here] * scale),
        label=label[here],
        segments=tuple(segment(*span) for span in spans),
        silences=() if silent[0] == silent[1] else (segment("silence", *silent),),
    )


def random_kpi(seed: int, *, days: float = 28.0, clean: bool = False) -> Sample:
    """Return a KPI of random kind, interval (1, 5 or 10 min), scale (1e-3 to 1e9), noise, season and start."""
    rng = np.random.default_rng([seed, 3])
    kind = KINDS[int(rng.integers(len(KINDS)))]
    interval_s = int(rng.choice([60, 300, 600]))
    scale = float(10 ** rng.uniform(-3, 9))
    if kind == "cpu":
        scale = float(rng.choice([1.0, 100.0]))  # a share or per cent
    return generate(
        days,
        interval_s,
        seed,
        int(rng.integers(1_400_000_000, 1_800_000_000)) // interval_s * interval_s * 1000,
        kind=kind,
        scale=scale,
        noise=float(10 ** rng.uniform(-0.5, 0.5)),
        season=float(rng.uniform(0, 1.4)),
        clean=clean,
        name=f"{kind}-{seed}",
    )


def write_csv(sample: Sample, file: TextIO) -> None:
    """Write `timestamp,value,label` lines: epoch seconds, six significant digits, 0 or 1."""
    columns = {"timestamp": sample.timestamp_ms // 1000, "value": sample.value, "label": sample.label.astype(np.int8)}
    pd.DataFrame(columns).to_csv(file, index=False, float_format="%.6g", lineterminator="\n")


# --- the kinds: day (N,) is the time in days since 1970 ---


def _requests(rng: np.random.Generator, day: Floats, interval_s: int, noise: float, season: float) -> _Base:
    load = _season(rng, day, season)
    trend = 1 + rng.normal(0, 0.04) * (day - day[0]) / 28
    expected = load * trend * np.exp(_wander(rng, day, 0.5, 0.025))
    swing = np.exp(noise * (_ar1(rng, len(day), 2400 / interval_s, 0.018) + rng.normal(0, 0.020, len(day))))
    return _Base(expected, np.maximum(expected * swing + noise * rng.normal(0, 0.004, len(day)), 0))


def _latency(rng: np.random.Generator, day: Floats, interval_s: int, noise: float, season: float) -> _Base:
    n = len(day)
    expected = np.exp(0.35 * (_season(rng, day, season) - 0.5) + _wander(rng, day, 0.7, 0.04))
    skewed = rng.gamma(4.0, 0.25, n) - 1  # mean 0, right tail
    slow = np.where(rng.random(n) < 0.01, np.minimum(rng.exponential(0.15, n), 0.5), 0.0)
    swing = noise * (_ar1(rng, n, 1800 / interval_s, 0.05) + 0.10 * skewed) + min(noise, 1) * slow
    return _Base(expected, expected * np.exp(np.clip(swing, -1, 1)))


def _cpu(rng: np.random.Generator, day: Floats, interval_s: int, noise: float, season: float) -> _Base:
    n = len(day)
    drive = rng.uniform(-1.3, -0.2) + 1.1 * (_season(rng, day, season) - 0.5) + _wander(rng, day, 0.5, 0.10)
    job = rng.uniform(0.3, 1.2) * ((day * 24 - rng.uniform(0, 6)) % 24 < rng.uniform(0.3, 1.0))  # the nightly backup
    calm = drive + job
    shaken = calm + noise * (_ar1(rng, n, 3600 / interval_s, 0.13) + rng.normal(0, 0.07, n))
    return _Base(_sigmoid(calm), _sigmoid(shaken), top=1.0)


def _errors(rng: np.random.Generator, day: Floats, interval_s: int, noise: float, season: float) -> _Base:
    n = len(day)
    rate = rng.uniform(0.2, 2.5) * (0.3 + 1.2 * _season(rng, day, season))
    mixed = rate * np.exp(noise * _ar1(rng, n, 1800 / interval_s, 0.35))
    return _Base(rate, rng.poisson(mixed).astype(np.float64), whole=True)


def _memory(rng: np.random.Generator, day: Floats, interval_s: int, noise: float, season: float) -> _Base:
    n = len(day)
    period = rng.uniform(0.3, 1.6)  # days from restart to restart
    lengths = period * rng.uniform(0.6, 1.3, int((day[-1] - day[0]) / period / 0.6) + 3)
    restarts = np.cumsum(lengths) + day[0] - rng.uniform(0, 0.6) * period
    last = np.searchsorted(restarts, day, side="right")  # (N,) which tooth
    begin = np.concatenate([[restarts[0] - lengths[0]], restarts])[last]
    slope = (0.35 * rng.uniform(0.8, 1.2, len(lengths) + 1))[last]
    floor = (0.40 + rng.normal(0, 0.012, len(lengths) + 1))[last]
    tooth = (day - begin) / period
    expected = floor + slope * tooth + 0.06 * season * (_season(rng, day, 1.0) - 0.5)
    swing = noise * (_ar1(rng, n, 1200 / interval_s, 0.006) + rng.normal(0, 0.003, n))
    return _Base(expected, np.clip(expected + swing, 0, 1), top=1.0)


def _queue(rng: np.random.Generator, day: Floats, interval_s: int, noise: float, season: float) -> _Base:
    n = len(day)
    load = _season(rng, day, season)
    expected = rng.uniform(1, 12) * (0.2 + load)
    bursts_a_point = np.minimum(8 * (0.3 + load) * interval_s / 86_400, 0.5)
    sizes = np.where(rng.random(n) < bursts_a_point, np.minimum(rng.exponential(2.5, n), 7), 0.0)
    drained = _leak(sizes, rng.uniform(300, 1500) / interval_s)
    waiting = expected * np.exp(noise * _ar1(rng, n, 900 / interval_s, 0.25)) * (1 + noise * drained)
    return _Base(expected, rng.poisson(waiting).astype(np.float64), whole=True)


_EVERY: Final = ("spike_up", "dip", "level_shift", "spike_down", "noise_burst", "slow_burn", "spike_up", "spike_down")
_UPWARD: Final = ("spike_up", "level_shift", "spike_up", "noise_burst", "spike_up", "slow_burn")
_COUNTED: Final = ("spike_up", "level_shift", "spike_up", "slow_burn")
_KINDS: Final = {
    "requests": _Kind("checkout.requests_per_s", 1200.0, _requests, _EVERY, falls=True),
    "latency": _Kind("checkout.latency_p99_ms", 180.0, _latency, _UPWARD, falls=False),
    "cpu": _Kind("checkout.cpu_percent", 100.0, _cpu, _EVERY, falls=False),
    "errors": _Kind("checkout.errors", 1.0, _errors, _COUNTED, falls=False),
    "memory": _Kind("checkout.memory_bytes", 4e9, _memory, _EVERY, falls=False),
    "queue": _Kind("checkout.queue_length", 1.0, _queue, _COUNTED, falls=False),
}
KINDS: Final = tuple(_KINDS)


# --- building blocks ---


def _season(rng: np.random.Generator, day: Floats, strength: float) -> Floats:
    """Return the load of a service, (N,), about 0.1 at night to 1 at the peak; flat at strength 0.

    The morning rises faster than the night falls, weekends are lower and start later.
    """
    hour_of_week = ((day + 3) % 7) * 24  # 1970 began on a Thursday; 0 is Monday 00:00
    # Friday evening and Monday morning are neither.
    weekend = np.interp(hour_of_week, [0, 5, 114, 124, 162, 168], [0.35, 0, 0, 1, 1, 0.35])
    low = rng.uniform(0.65, 0.95)
    shift = rng.normal(0, 0.7)
    hour = (day * 24 - shift - rng.uniform(0.5, 2.0) * weekend) % 24

    def bump(centre: float, width_h: float, height: float) -> Floats:
        sharpness = (24 / (2 * math.pi * width_h)) ** 2  # von Mises: a bell on the clock's face
        height *= rng.uniform(0.8, 1.2)
        return np.asarray(height * np.exp(sharpness * (np.cos((hour - centre) * (2 * math.pi / 24)) - 1)))

    work = bump(9.8, 1.9, 0.55) + bump(15.2, 2.6, 0.60)
    lunch = bump(12.5, rng.uniform(0.4, 0.9), rng.uniform(0.08, 0.28))
    shape = 0.14 + (1 - 0.3 * weekend) * work + lunch + bump(20.4, 1.7, 0.72)
    load = shape / 1.05 * (1 - (1 - low) * weekend)
    middle = float(load.mean())
    return np.maximum(middle + strength * (load - middle), 0.04)


def _leak(inflow: Floats, tau: float) -> Floats:
    """Return x[t] = inflow[t] + exp(-1 / tau) x[t - 1], (N,), by doubling: no loop over points."""
    x, step = inflow, 1
    while step < min(_GONE * tau, len(x)):
        x = np.concatenate([x[:step], x[step:] + math.exp(-step / tau) * x[:-step]])
        step *= 2
    return x


def _ar1(rng: np.random.Generator, n: int, tau: float, sd: float) -> Floats:
    """Return (n,) stationary AR(1) noise that forgets in tau points."""
    tau = max(tau, 0.1)
    past = math.ceil(_GONE * tau)
    shocks = rng.normal(0, sd * math.sqrt(-math.expm1(-2 / tau)), past + n)
    return _leak(shocks, tau)[past:]


def _wander(rng: np.random.Generator, day: Floats, step: float, sd: float) -> Floats:
    """Return (N,) a smooth slow walk around 0, a knot every `step` days."""
    knots = rng.normal(0, sd, int((day[-1] - day[0]) / step) + 3)
    knots[1:] = 0.6 * knots[:-1] + 0.8 * knots[1:]
    place = (day - day[0]) / step
    left = place.astype(np.int64)
    part = place - left
    part = part * part * (3 - 2 * part)
    return np.asarray((1 - part) * knots[left] + part * knots[left + 1])


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))


def _six_digits(x: Floats) -> Floats:
    """Round (N,) to what `%.6g` prints, so that a written sample reads back equal."""
    digits = 5 - np.floor(np.log10(np.maximum(np.abs(x), 1e-12))).astype(np.int64)
    up, down = 10.0 ** np.maximum(digits, 0), 10.0 ** np.maximum(-digits, 0)  # powers of ten below 1e22 are exact
    return np.asarray(np.rint(x * up / down) / up * down)


# --- anomalies and missing points ---

_Span: TypeAlias = tuple[str, int, int, bool]  # kind, first point, end, subtle

_MINUTES: Final = {
    "spike_up": (1, 14),
    "spike_down": (1, 14),
    "dip": (15, 45),
    "level_shift": (60, 150),
    "slow_burn": (90, 150),
    "noise_burst": (35, 65),
}


def _anomalies(
    rng: np.random.Generator, base: _Base, kind: _Kind, days: float, interval_s: int
) -> tuple[Floats, npt.NDArray[np.bool_], list[_Span], tuple[int, int]]:
    """Return the values with anomalies, their labels, their spans, and the silence (first point, end)."""
    n = len(base.value)
    count = max(2, round(days * _SEGMENTS_A_DAY))
    kinds = [kind.anomalies[i % len(kind.anomalies)] for i in range(count)]
    subtle = [i % _SUBTLE_EVERY == _SUBTLE_EVERY - 1 for i in range(count)]
    # The time after the warm-up is cut into equal stretches, one for each and one for the silence: none overlap.
    edges = np.linspace(WARM_UP * n, 0.99 * n, count + 2).astype(np.int64)
    order = rng.permutation(count + 1)
    value, label, spans, silent = base.value.copy(), np.zeros(n, np.bool_), [], (n, n)
    for stretch, which in enumerate(order):
        lo, hi = int(edges[stretch]), int(edges[stretch + 1])
        if which == count:
            length = min(round(rng.uniform(3, 7) * 3600 / interval_s), (hi - lo) // 2)
            first = int(rng.integers(lo, hi - length))
            silent = (first, first + length)
            continue
        minutes = rng.uniform(*_MINUTES[kinds[which]])
        length = min(max(1, round(minutes * 60 / interval_s)), max(1, (hi - lo) // 3))
        first = _place(rng, base, lo, hi - length, length)
        span = slice(first, first + length)
        value[span] = _distort(rng, base, kind, kinds[which], span, subtle[which])
        label[span] = True
        spans.append((kinds[which], first, first + length, subtle[which]))
    return value, label, spans, silent


def _place(rng: np.random.Generator, base: _Base, lo: int, hi: int, length: int) -> int:
    """Return a start in lo..hi, by preference under load: what falls from nothing cannot be seen."""
    starts = rng.integers(lo, max(hi, lo + 1), 6)
    busy = base.expected[np.minimum(starts + length // 2, len(base.expected) - 1)] >= np.median(base.expected)
    return int(starts[np.argmax(busy)])


def _distort(rng: np.random.Generator, base: _Base, kind: _Kind, anomaly: str, span: slice, subtle: bool) -> Floats:
    """Return the values of one anomaly, (length,)."""
    value, expected = base.value[span], base.expected[span]
    length = len(value)
    residual = (base.value - base.expected)[max(0, span.start - 200) : span.stop + 200]
    spread = float(residual.std()) + 1e-3 * float(np.abs(base.expected).mean())
    level = float(expected.mean())
    if anomaly == "noise_burst":
        loud = spread * (3 if subtle else rng.uniform(6, 10)) * rng.standard_normal(length)
        # What is skewed is never much faster than usual.
        return _bounded(base, np.abs(value + loud) if "dip" in kind.anomalies else value + np.abs(loud))

    ramp = np.arange(1, length + 1) / length
    if anomaly in ("spike_up", "spike_down"):
        sigmas, share = (rng.uniform(5, 6), 0.0) if subtle else (rng.uniform(9, 16), rng.uniform(0.25, 0.6))
        shape = np.exp(-np.arange(length) / 1.5) if rng.random() < 0.5 else np.ones(length)
    elif anomaly == "dip":
        sigmas, share = (rng.uniform(4, 5), 0.0) if subtle else (rng.uniform(8, 12), rng.uniform(0.35, 0.7))
        shape = np.minimum(1, np.minimum(ramp * length, (1 - ramp) * length + 1) / 2)
    elif anomaly == "level_shift":
        sigmas, share = (rng.uniform(3, 4), 0.0) if subtle else (rng.uniform(6, 9), rng.uniform(0.2, 0.4))
        shape = np.ones(length)
    else:
        sigmas, share = (rng.uniform(4, 5), 0.0) if subtle else (rng.uniform(8, 12), rng.uniform(0.3, 0.6))
        shape = ramp

    size = max(sigmas * spread, share * level)
    if anomaly in ("spike_down", "dip") or (anomaly in ("level_shift", "slow_burn") and kind.falls):
        # An outage takes a share of what there is, up to all of it; what rises has no such bound.
        lost = min(size / max(level, 1e-9), 0.95)
        if anomaly == "spike_down" and not subtle and rng.random() < 0.25:
            lost = 1.0
        return _bounded(base, value * (1 - lost * shape))
    if not subtle:
        size = max(size, (0.7 if anomaly == "level_shift" else 1.3) * float(residual.max()))  # above the usual bursts
    return _bounded(base, value + size * shape)


def _bounded(base: _Base, value: Floats) -> Floats:
    bounded = np.clip(value, 0, base.top)
    return np.rint(bounded) if base.whole else bounded


def _missing(rng: np.random.Generator, n: int, days: float) -> npt.NDArray[np.bool_]:
    """Return (n,), True = no row: single points and short runs; never the first or the last point."""
    missing = rng.random(n) < _BLANK
    for first in rng.integers(0, n, rng.poisson(_RUNS_A_DAY * days)):
        missing[first : first + int(rng.integers(2, 9))] = True
    missing[[0, -1]] = False
    return missing
