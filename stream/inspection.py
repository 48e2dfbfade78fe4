"""What the state of a series says, in terms that people know: read from its blob alone, without its model."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from models.pot import Health, PotConfig, Spot
from stream import versions
from stream.blobs import SHADOW, opened
from stream.columns import AnyArray
from stream.errors import StateError
from stream.events import SEVERITIES, iso_time
from stream.incidents import State
from stream.placing import NO_PHASE
from stream.snapshot import record_dtype
from stream.withheld import unpacked

_LATEST_MS = 253_402_300_799_999  # the end of the year 9999


class ThresholdState(msgspec.Struct, frozen=True):
    """The threshold of a series; `models.pot` explains the words."""

    health: str  # warming, prior, ok, degenerate or drifting
    z_q: float | None  # the score that alarms; None while there is none
    t: float | None  # the score above which the tail begins
    q: float  # risk
    n: int  # scores that it was built from
    n_excess: int  # of them above t
    judged: int
    alarms: int


class IncidentState(msgspec.Struct, frozen=True):
    """What goes on."""

    state: str  # pending, muted or open
    severity: str
    opened: str | None
    last: str | None  # its latest anomalous point
    anomalies: int
    peak_ratio: float


class SeriesState(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state of a series, or of the model that judges it in the shadow."""

    name: str
    shadow: bool
    bytes: int
    version: int  # of the blob
    model: int  # `blobs.model_id` of it
    window: int  # cells
    features: int
    interval_s: float | None  # None while it is not known
    probing: bool  # points are held until the interval is known, or known anew
    last_point: str | None  # the newest event time
    last_arrival: str | None
    silent: bool
    filled: float  # share of the window that holds values
    learned: float  # share of it that holds values as they came, neither completed nor flagged
    threshold: ThresholdState
    incident: IncidentState | None = None


def inspected(field: bytes, blob: bytes, pot: PotConfig) -> SeriesState:
    """Return what a blob says.

    Args:
        field: what it is kept under.
        blob: of any version that can be read.
        pot: settings of the threshold; the size of its ring is not in the blob.

    Raises:
        StateError: it is damaged, of an unknown version, or was made with another ring; it names its series.
    """
    name = field.removesuffix(SHADOW).decode("utf-8", "replace")
    spot = Spot(pot, 1)
    header, body = opened(field, blob, spot.dtype)
    window, features = header.window, header.features
    # A window that no record of these bytes can have would make a layout of gigabytes.
    least = 4 * window * features
    layout = record_dtype(window, features, spot.dtype) if window and features and least <= len(body) else None
    if layout is None or len(body) < layout.itemsize:
        raise StateError(
            f"state of {name!r}: {len(body)} bytes are too few for a window of {window} cells of {features} features; "
            "the threshold's ring was changed"
        )
    row = np.frombuffer(body, layout, 1)[0]
    learned = unpacked(row["learned_bits"], window)
    known = int(row["interval_ms"]) > 0 and int(row["phase_ms"]) != NO_PHASE
    filled = int(row["filled"])
    return SeriesState(
        name=name,
        shadow=field.endswith(SHADOW),
        bytes=len(blob),
        version=versions.version_of(blob) or 0,
        model=header.model,
        window=window,
        features=features,
        interval_s=int(row["interval_ms"]) / 1000 if known else None,
        probing=bool(row["probing"]),
        last_point=_time(row["heard_ms"]),
        last_arrival=_time(row["arrived_ms"]),
        silent=bool(row["silent"]),
        filled=round(filled / window, 3),
        learned=round(float(learned.mean()), 3) if filled else 0.0,
        threshold=_threshold(name, row["threshold"], spot),
        incident=_incident(row),
    )


def _threshold(name: str, packed: AnyArray, spot: Spot) -> ThresholdState:
    at = np.zeros(1, np.int64)
    try:
        with np.errstate(over="ignore"):  # of a t that no score can reach
            spot.unpack(at, packed.reshape(1))
    except StateError as e:
        raise StateError(f"state of {name!r}: {e}") from None
    health = Health(int(spot.health(at)[0]))
    if health == Health.WARMING and np.isfinite(packed["z"]):
        health = Health.PRIOR  # which is not at hand
    mean = float(packed["mean"]) if packed["depth"] else 0.0
    return ThresholdState(
        health=health.name.lower(),
        z_q=_finite(float(packed["z"]) + mean),
        t=_finite(float(packed["t"]) + mean),
        q=float(packed["q"]),
        n=int(packed["n"]),
        n_excess=int(packed["n_excess"]),
        judged=int(packed["judged"]),
        alarms=int(packed["n_alarms"]),
    )


def _incident(row: AnyArray) -> IncidentState | None:
    if not State.CLEAR < row["state"] <= State.OPEN:
        return None
    severity = int(row["severity"])
    return IncidentState(
        state=State(int(row["state"])).name.lower(),
        severity=SEVERITIES[severity - 1] if 1 <= severity <= len(SEVERITIES) else "none",
        opened=_time(row["opened_ms"]),
        last=_time(row["last_ms"]),
        anomalies=int(row["anomalies"]),
        peak_ratio=float(f"{float(row['peak_ratio']):.4g}"),
    )


def _time(ms: Any) -> str | None:
    """Return a time; None of none, and of what is none."""
    return iso_time(int(ms)) if 0 <= int(ms) <= _LATEST_MS else None


def _finite(x: float) -> float | None:
    return float(f"{x:.6g}") if math.isfinite(x) else None
