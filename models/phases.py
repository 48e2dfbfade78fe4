"""The phases of a row's life, and what its state may hold in each."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models.errors import StateError
from models.gpd import SHAPE_MAX, SHAPE_MIN
from models.risk import PotConfig

# The phases. A row below GROWING has no fit to its own scores, or an old one; one below RING has no final t.
CALIBRATING, RELEARNING, GROWING, RING = 0, 1, 2, 3
NEVER: Final = 2**62


def validate(packed: npt.NDArray[Any], config: PotConfig) -> None:
    """Raise StateError, naming field and value, unless every row is one that `models.tail.Tails` could have made."""
    f = {name: packed[name] for name in packed.dtype.names or ()}
    size, finite = config.max_excess, np.isfinite
    phase, held, n, n_excess, t, z = (f[name] for name in ("phase", "held", "n", "n_excess", "t", "z"))
    fresh, ring, fitted = phase == CALIBRATING, phase == RING, phase >= GROWING
    used = np.arange(size) < held[:, None]
    peaks, ceilings = f["peaks"], f["ceilings"]
    above = (used & (peaks > t[:, None])).sum(axis=-1)
    counted = np.where(ring, (n_excess >= held) & (held == above), n_excess == above)
    counted = np.where(fitted, counted & (n_excess <= n), (n_excess >= 0) & (~fresh | (n_excess <= n)))
    capped = np.where(fitted[:, None], ceilings >= peaks, (ceilings >= 0) & finite(ceilings))
    checks: tuple[tuple[str, Any], ...] = (
        ("phase", phase <= RING),
        ("n", (n >= 0) & (n < NEVER)),
        ("held", (held <= size) & (held <= n) & (ring | (held >= np.minimum(n, size // 2)))),
        ("cursor", np.where(ring, f["cursor"] < size, f["cursor"] == 0)),
        ("n_excess", counted),
        ("due", (f["due"] > 0) & (f["due"] <= NEVER)),
        ("mark", (f["mark"] >= 0) & (f["mark"] <= n)),
        ("t", np.where(fresh, finite(t) == finite(z), finite(t))),
        ("z", np.where(fresh, (z == np.inf) | (z >= t), finite(z) & (z >= t))),
        ("shape", (f["shape"] >= SHAPE_MIN) & (f["shape"] <= SHAPE_MAX)),
        ("scale", finite(f["scale"]) & (f["scale"] >= 0)),
        ("var_shape", finite(f["var_shape"]) & (f["var_shape"] >= 0)),
        ("covariance", finite(f["covariance"])),
        ("var_log_scale", finite(f["var_log_scale"]) & (f["var_log_scale"] >= 0)),
        ("share", (f["share"] >= 0) & (f["share"] <= 1)),
        ("q", (f["q"] > 0) & (f["q"] <= config.q_max)),
        ("low", np.where(n == 0, f["low"] == np.inf, finite(f["low"]))),
        ("peaks", np.where(used, finite(peaks), peaks == -np.inf).all(axis=-1)),
        ("ceilings", np.where(used, capped, ceilings == np.inf).all(axis=-1)),
        ("settled", f["settled"] <= f["depth"]),
        ("mean", np.where(f["settled"] > 0, finite(f["mean"]), f["mean"] == 0)),
        ("judged", f["judged"] >= 0),
        ("n_alarms", f["n_alarms"] <= f["judged"]),
        ("onsets", f["onsets"] <= f["n_alarms"]),
        ("promised", finite(f["promised"])),
    )
    for name, good in checks:
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise StateError(
                f"threshold state {row} of {len(packed)} is damaged: {name}={f[name][row]!r} does not fit the rest; "
                "drop it and rebuild from the log"
            )
