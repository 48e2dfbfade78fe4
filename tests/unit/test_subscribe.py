"""Which events a filter lets pass, and what a subscription refuses before it talks to anyone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from stream.commands.live import Kind, Severity
from stream.errors import ConfigError
from stream.events import (
    SEVERITIES,
    TYPE_CORRECTED,
    TYPE_OPENED,
    TYPE_RESOLVED,
    TYPE_RESUMED,
    TYPE_RETRACTED,
    TYPE_SILENT,
    Event,
    SilenceData,
    iso_time,
    make_event,
)
from stream.subscribe import EVENT_TYPES, Filter, subscribe
from tests.helpers import T0
from tests.unit.test_report import event


def anomaly(kind: str = TYPE_OPENED, kpi: str = "checkout.latency", **data: Any) -> Event:
    made = event(kind, "i", 0, kpi=kpi)
    return msgspec.structs.replace(made, data=msgspec.structs.replace(made.data, **data))


def silence(kind: str = TYPE_SILENT, rule: str = "", kpi: str = "checkout.latency") -> Event:
    data = SilenceData(
        kpi=kpi, last_seen=iso_time(T0), interval_s=60.0, silent_after_s=600.0, basis="event_time", rule=rule
    )
    return make_event(kind, f"{kpi}-{kind}", T0, data)


def test_without_options_all_pass() -> None:
    every = [anomaly(), anomaly(TYPE_RESOLVED), anomaly(TYPE_RETRACTED), silence()]
    assert all(Filter().matches(one) and Filter.of().matches(one) for one in every)


@pytest.mark.parametrize(
    ("globs", "passes"),
    [
        ("checkout.*", True),
        ("checkout.latency", True),
        ("Checkout.*", False),  # case and all
        ("checkout", False),
        ("db.*", False),
        (["db.*", "*.latency"], True),
        (["db.*", "*.errors"], False),
        ([], False),
    ],
)
def test_kpi(globs: str | list[str], passes: bool) -> None:
    assert Filter.of(kpi=globs).matches(anomaly()) is passes


def test_severity() -> None:
    for i, least in enumerate(SEVERITIES):
        passing = [s for s in SEVERITIES if Filter.of(min_severity=least).matches(anomaly(severity=s))]
        assert passing == list(SEVERITIES[i:])


@pytest.mark.parametrize(
    ("globs", "passes"),
    [
        ("m", True),
        ("m@1", True),
        ("m@*", True),
        ("m@2", False),
        ("m@10", False),
        ("*@1", True),
        ("n", False),
        (("n", "m"), True),
        ("*", True),
    ],
)
def test_model(globs: str | tuple[str, ...], passes: bool) -> None:
    assert Filter.of(model=globs).matches(anomaly()) is passes


def test_rule() -> None:
    labelled = anomaly(rule="checkout")
    assert Filter.of(rule="checkout").matches(silence(rule="checkout"))
    assert Filter.of(rule="check*").matches(labelled) and not Filter.of(rule="db").matches(labelled)
    assert Filter.of(rule="").matches(silence()) and not Filter.of(rule="").matches(labelled)
    assert not Filter.of(rule="checkout").matches(silence())


@pytest.mark.parametrize("types", [["opened"], "opened", ("tocsin.anomaly.opened",), ["opened", "silent"]])
def test_types(types: Any) -> None:
    wanted = Filter.of(types=types)
    assert wanted.matches(anomaly()) and not wanted.matches(anomaly(TYPE_RESOLVED))
    assert wanted.matches(silence()) is ("silent" in types)
    assert not wanted.matches(silence(TYPE_RESUMED))


def test_an_event_of_a_type_still_unknown_does_not_pass() -> None:
    assert not Filter().matches(anomaly("tocsin.anomaly.renamed"))


def test_what_mends_an_event_that_was_wanted_is_wanted_whatever_its_severity() -> None:
    corrected = anomaly(TYPE_CORRECTED, severity="warning")
    assert not Filter.of(min_severity="major").matches(corrected)
    assert Filter.of(min_severity="major").matches(corrected, mends=True)
    assert not Filter.of(types=["opened"]).matches(corrected, mends=True)


def test_silence_has_no_severity_and_no_model() -> None:
    assert Filter.of(min_severity="critical").matches(silence())
    assert not Filter.of(model="m").matches(silence())


def test_a_filter_that_cannot_match_is_refused_before_anything_is_connected() -> None:
    with pytest.raises(ConfigError, match=r"min_severity='loud'.*warning, major, critical"):
        subscribe("127.0.0.1:1", min_severity="loud")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no 'close'.*opened, updated"):
        subscribe("127.0.0.1:1", types=["close"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="start='now'"):
        subscribe("127.0.0.1:1", start="now")  # type: ignore[arg-type]


def test_the_command_knows_the_same_words() -> None:
    assert tuple(Kind) == EVENT_TYPES
    assert tuple(Severity) == SEVERITIES
