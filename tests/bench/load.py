"""The load of the benches: many KPIs in step, as a scrape of a large fleet makes them, with rare anomalies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stream.columns import Columns, Float64Array, Int32Array

START_MS = 1_767_571_200_000
INTERVAL_MS = 60_000


@dataclass(frozen=True)
class Load:
    """`kpis` series of `steps` minutes; value[t, k] of KPI k in minute t."""

    value: Float64Array  # (steps, kpis)

    @classmethod
    def make(cls, kpis: int, steps: int, seed: int = 0) -> Load:
        """Return a load: slow waves, noise, and one spike in ten thousand points."""
        rng = np.random.default_rng(seed)
        minute = np.arange(steps)[:, None]
        wave = 100 + 10 * np.sin(2 * np.pi * (minute / 60 + rng.random(kpis)))
        value = wave + rng.normal(0, 1, (steps, kpis)) + 40 * (rng.random((steps, kpis)) < 1e-4)
        return cls(np.round(value, 3).astype(np.float64))

    @property
    def kpis(self) -> int:
        """How many KPIs."""
        return int(self.value.shape[1])

    def name(self, kpi: int) -> str:
        """Return the name of a KPI."""
        return f"shop.web-{kpi:05d}.latency_ms"

    def columns(self, slot: Int32Array, step: int) -> Columns:
        """Return the points of one minute, decoded."""
        return Columns.of(slot, np.full(self.kpis, START_MS + step * INTERVAL_MS), self.value[step])

    def records(self, begin: int, end: int) -> list[tuple[bytes, bytes]]:
        """Return (key, value) of the minutes from `begin` to `end`, in the order of time."""
        names = [self.name(kpi) for kpi in range(self.kpis)]
        keys = [name.encode() for name in names]
        return [
            (keys[k], b'{"kpi":"%b","timestamp":%d,"value":%b}' % (keys[k], stamp, repr(x).encode()))
            for step in range(begin, end)
            for stamp in [(START_MS + step * INTERVAL_MS) // 1000]
            for k, x in enumerate(self.value[step].tolist())
        ]
