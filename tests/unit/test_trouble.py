from __future__ import annotations

import logging

import pytest

from stream.trouble import Behind, Trouble


def test_trouble_is_said_when_it_begins_now_and_then_and_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    times_s = iter([100.0, 101.0, 129.9, 130.0, 131.0, 131.5])
    trouble = Trouble(logging.getLogger("tests"), lambda: next(times_s))
    trouble.over("nothing was wrong")
    for what in ("away", "still", "still", "yet", "yet"):
        trouble.say(what)
        assert trouble.what == what
    trouble.over("back")
    trouble.say("away again")
    assert [(one.levelname, one.message) for one in caplog.records] == [
        ("ERROR", "away"),
        ("ERROR", "yet"),
        ("WARNING", "back"),
        ("ERROR", "away again"),
    ]


def test_a_lag_that_lasts_is_said_with_the_pace_and_its_end() -> None:
    behind = Behind()
    said = [
        (now_s, text)
        for now_s, lag, points in (
            (0.0, 9_999, 0),
            (1.0, 10_000, 10),
            (10.9, 50_000, 1_000),
            (11.0, 60_000, 2_000),
            (70.9, 90_000, 8_000),
            (71.0, 90_000, 8_000),
            (131.0, 1_234_567, 608_000),
            (132.0, 9_999, 1_900_000),
            (133.0, 9_999, 1_900_000),
        )
        if (text := behind.look(now_s, lag, points))
    ]
    assert said == [
        (11.0, "behind: 60,000 points wait"),
        (71.0, "behind: 90,000 points wait, 100 a second are judged"),
        (131.0, "behind: 1,234,567 points wait, 10,000 a second are judged"),
        (132.0, "caught up: no more points wait than come"),
    ]


def test_a_short_lag_is_not_worth_a_word() -> None:
    behind = Behind()
    assert not any([behind.look(float(i), 100_000 if i % 10 else 0, 1000 * i) for i in range(40)])
    assert not behind.look(40.0, 0, 0)
