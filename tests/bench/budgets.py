"""False alarms on real KPIs against the budget that was asked for: `python -m tests.bench.budgets [DIRECTORY]`.

Every KPI is watched three times in one detector, under rules of one false alarm a day, a week and a month, by the
bundled general checkpoint, which has never seen it. A false alarm is an incident that was open at no labelled point.
Printed are, for each KPI and budget, the false alarms, those that the budget allows in its unlabelled time, and the
labelled segments that were caught.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from stream import backtest
from stream.csvfile import merge, read_table
from stream.detector import Counts
from stream.events import TYPE_OPENED, Event, EventData
from stream.points import Points
from stream.report import Segment, Summary, summarise
from stream.rules import parse_rules
from stream.service import detector_factory, use_one_thread
from stream.settings import load_settings

BUDGETS = {"day": 86_400_000, "week": 7 * 86_400_000, "month": 2_629_746_000}
RULES = "rules:\n" + "".join(f"- {{match: '{name}/*', false_alarms: 1 per {name}}}\n" for name in BUDGETS)


def load(directory: Path) -> Points:
    """Return the KPIs of a directory as one stream; the training and test files of one are one KPI."""
    tables = [read_table(path) for path in sorted(directory.glob("*.csv.gz"))]
    points = merge(tables)
    short = [name.removesuffix("_train").removesuffix("_test") for name in points.names]
    names = tuple(dict.fromkeys(short))
    kpi = np.array([names.index(name) for name in short], np.int32)[points.kpi]
    return Points(names, points.timestamp_ms, kpi, points.value, points.label)


def tripled(points: Points) -> Points:
    """Return every KPI once for each budget, `<budget>/<KPI>`."""
    names = tuple(f"{budget}/{name}" for budget in BUDGETS for name in points.names)
    kpi = points.kpi[:, None] + np.arange(len(BUDGETS), dtype=np.int32) * len(points.names)  # (N, 3)

    def thrice(column: np.ndarray[tuple[int], np.dtype[Any]]) -> np.ndarray[tuple[int], np.dtype[Any]]:
        return np.repeat(column, len(BUDGETS))

    return Points(names, thrice(points.timestamp_ms), kpi.ravel(), thrice(points.value), thrice(points.label))


def measure(points: Points) -> tuple[Summary, list[Event], Counts]:
    """Run all of them through one detector."""
    settings = load_settings({})
    rules = parse_rules(RULES, source="budgets", base=Path(), defaults=settings.policy())
    detector = detector_factory(settings, rules)()
    began = time.monotonic()
    events = [event for _, result in backtest.run(detector, points) for event in result.events]
    return (
        summarise(points, events, detector.counts, elapsed_s=time.monotonic() - began),
        events,
        detector.counts,
    )


def unlabelled_ms(points: Points, kpi: int) -> int:
    """Return how long a KPI was watched at points that are not labelled anomalous; gaps do not count."""
    own = points.kpi == kpi
    stamp = np.unique(points.timestamp_ms[own])
    step = int(np.median(np.diff(stamp)))
    return int((points.label[own] != 1).sum()) * step


def table(points: Points, events: list[Event], segments: tuple[Segment, ...]) -> list[dict[str, float | str]]:
    """Return a row a KPI and budget."""
    opened: dict[str, set[str]] = {name: set() for name in points.names}
    for event in events:
        if event.type == TYPE_OPENED and isinstance(event.data, EventData):
            opened[event.subject].add(event.data.incident)
    rows: list[dict[str, float | str]] = []
    for k, name in enumerate(points.names):
        budget, kpi = name.split("/", 1)
        of_kpi = [segment for segment in segments if segment.kpi == name]
        summary = summarise_one(points, events, k)
        weeks = unlabelled_ms(points, k) / BUDGETS["week"]
        allowed = weeks * BUDGETS["week"] / BUDGETS[budget]
        rows.append(
            {
                "kpi": kpi,
                "budget": f"1 per {budget}",
                "weeks": round(weeks, 2),
                "incidents": len(opened[name]),
                "false": summary,
                "allowed": round(allowed, 1),
                "ratio": round(summary / allowed, 2),
                "false_per_week": round(summary / weeks, 2),
                "caught": f"{sum(one.incident is not None for one in of_kpi)}/{len(of_kpi)}",
            }
        )
    return rows


def summarise_one(points: Points, events: list[Event], kpi: int) -> int:
    """Return the false alarms of one KPI."""
    own = points.kpi == kpi
    name = points.names[kpi]
    part = Points(
        (name,), points.timestamp_ms[own], np.zeros(int(own.sum()), np.int32), points.value[own], points.label[own]
    )
    of_kpi = [event for event in events if event.subject == name]
    return summarise(part, of_kpi, Counts(), elapsed_s=1.0).false_alarms or 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.budgets")
    default = os.environ.get("TOCSIN_TEST_DATA", "")
    parser.add_argument("directory", type=Path, nargs="?", default=Path(default) / "kpi" if default else None)
    asked = parser.parse_args()
    if asked.directory is None:
        sys.stderr.write("budgets: not measured: name a directory of labelled CSV files, or set TOCSIN_TEST_DATA\n")
        return
    use_one_thread()
    points = tripled(load(asked.directory))
    summary, events, _ = measure(points)
    rows = table(points, events, summary.segments)
    names = list(rows[0])
    for line in [names, *([str(row[name]) for name in names] for row in rows)]:
        sys.stdout.write("  ".join(f"{cell:>14}" for cell in line) + "\n")
    for budget in BUDGETS:
        some = [row for row in rows if row["budget"] == f"1 per {budget}"]
        false, allowed = (sum(float(row[name]) for row in some) for name in ("false", "allowed"))
        sys.stdout.write(f"1 per {budget}: {false:.0f} false alarms, {allowed:.0f} allowed, {false / allowed:.2f}\n")
    sys.stdout.write(f"{summary.points:,} points, {summary.points_per_s:,.0f} a second\n")


if __name__ == "__main__":
    main()
