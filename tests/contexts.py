"""Contexts for the tests of the models: what is not said is as plain as can be."""

import numpy as np

from models.base import Bool, Context, Float64, Int64


def context(
    history: Float64,
    usual_step: Float64 | None = None,
    learned: Bool | None = None,
    *,
    value: Float64 | None = None,
    time_ms: Int64 | None = None,
    ahead: Float64 | None = None,
    member: Int64 | None = None,
) -> Context:
    """Points after these windows, (B, H, F): none arrived, all before it did, no usual step is known."""
    rows, _, features = history.shape
    return Context(
        history,
        np.ones(history.shape, np.bool_) if learned is None else learned,
        np.full((rows, features), np.nan) if value is None else value,
        np.zeros(rows, np.int64) if time_ms is None else time_ms,
        np.full((rows, features), np.nan) if usual_step is None else usual_step,
        ahead,
        member,
    )
