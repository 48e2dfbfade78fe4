"""What the fields of CSV files say: numbers, times, labels; and how they are shown to people."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from stream.records import SECONDS_BELOW, TIMESTAMP_MAX_MS

_NO_VALUE: Final = frozenset({"", "nan", "null", "none", "na", "n/a"})
_NORMAL: Final = ("0", "false", "f", "no", "n")
_ANOMALOUS: Final = ("1", "true", "t", "yes", "y")
BAD_LABEL: Final = 2  # code of a label that is none of these words
_MODERN_MS: Final = 1e12  # September 2001


class _Labels(dict[str, int]):
    """Label word -> 1, 0, -1 (unknown), or `BAD_LABEL`."""

    def __missing__(self, text: str) -> int:
        word = text.strip().lower()
        number = number_of(word)  # 1.0, 0.000e+00
        if word in _NORMAL or number == 0:
            code = 0
        elif word in _ANOMALOUS or number == 1:
            code = 1
        else:
            code = -1 if math.isnan(number) else BAD_LABEL
        if len(self) < 1000:
            self[text] = code
        return code


LABELS: Final = _Labels()


def floats(column: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return (N,) numbers; NaN = missing, inf = infinite or not a number."""
    if _plain(column):
        try:
            return np.fromiter(map(float, column), np.float64, len(column))
        except ValueError:
            pass  # an empty field, or a torn one: tell them apart below
    return np.array([number_of(text) for text in column], np.float64)


def _plain(column: Sequence[str]) -> bool:
    """True if Python's `float` takes nothing here that a CSV would not mean: 1_000, other scripts' digits."""
    joined = "".join(column)
    return joined.isascii() and "_" not in joined


def number_of(text: str) -> float:
    """Return one number; NaN = missing, inf = infinite or not a number."""
    word = text.strip()
    if word.lower() in _NO_VALUE:
        return math.nan
    try:
        return float(word) if _plain(word) else math.inf
    except ValueError:
        return math.inf


def is_number(text: str) -> bool:
    """True for inf and numbers too large for a float as well, which `number_of` does not tell from a word."""
    try:
        float(text)
    except ValueError:
        return False
    return _plain(text)


def times(column: Sequence[str]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return (N,) timestamps, NaN where unreadable, and which are numbers that wait for a unit (the others are ms)."""
    if _plain(column):
        try:
            number = np.fromiter(map(float, column), np.float64, len(column))
            return _finite(number), np.isfinite(number)
        except ValueError:
            pass
    words = [text.strip() for text in column]
    iso = np.fromiter(map(looks_iso, words), np.bool_, len(words))
    stamp = np.full(len(words), np.nan)
    stamp[iso] = _iso_ms([word for word in words if looks_iso(word)])
    stamp[~iso] = [number_of(word) for word in words if not looks_iso(word)]
    return _finite(stamp), ~iso & np.isfinite(stamp)


def _finite(stamp: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return NaN for inf, and numbers small enough to be multiplied by a unit."""
    return np.where(np.isinf(stamp), np.nan, np.clip(stamp, -1e17, 1e17))


def looks_iso(word: str) -> bool:
    """Say whether a word begins as an ISO 8601 time does."""
    return word[4:5] == "-" and word[:4].isdecimal() and word.isascii()


def _iso_ms(words: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return (N,) milliseconds since 1970 UTC; NaN where not ISO 8601."""
    parsed = pd.to_datetime(pd.Series(words, dtype=object), format="ISO8601", utc=True, errors="coerce")
    micros = parsed.dt.tz_localize(None).to_numpy("datetime64[us]")
    ms = np.rint(micros.astype(np.int64) / 1000)  # exact: below 2**53
    return np.where(np.isnat(micros), np.nan, ms)


def unit_ms_of(numbers: npt.NDArray[np.float64]) -> float:
    """Return the file's unit of numeric timestamps in milliseconds: 1000 for seconds, 1 for milliseconds."""
    return 1000.0 if not len(numbers) or np.median(numbers) < SECONDS_BELOW else 1.0


def in_range(stamp: npt.NDArray[np.float64], numeric: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Tell the timestamps, (N,) in ms, that can be meant: 1970 to 2200, and no digit lost or gained."""
    fine = (stamp >= 0) & (stamp <= TIMESTAMP_MAX_MS)
    middle = np.median(stamp[numeric]) if numeric.any() else 0.0
    if middle >= _MODERN_MS:
        fine &= ~numeric | ((stamp > middle / 10) & (stamp < middle * 10))
    return np.asarray(fine)


def short(text: str, limit: int = 60) -> str:
    """Quote a text for a message: escaped, and cut at a limit."""
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "…"
