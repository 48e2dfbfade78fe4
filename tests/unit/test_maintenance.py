import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from stream.calendars import Calendar
from stream.columns import Int64Array
from stream.errors import ConfigError
from stream.maintenance import Once, Weekly, instant_ms, local_ms
from stream.policy import Schedule

BERLIN = "Europe/Berlin"
MINUTE = 60_000
ALL_DAYS = tuple(range(7))


def utc(text: str) -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def active(schedule: Schedule, *texts: str) -> list[bool]:
    found: list[bool] = schedule.active(np.array([utc(text) for text in texts], np.int64)).tolist()
    return found


def open_times(schedule: Schedule, start: str, end: str) -> list[str]:
    """Return, in UTC, the stretches for which the schedule is active, looked at by the minute."""
    times: Int64Array = np.arange(utc(start), utc(end), MINUTE)
    on = schedule.active(times)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], on.astype(np.int8), [0]])))
    shown = [str(np.datetime64(ms, "ms").astype("datetime64[m]"))[5:] for ms in (utc(start) + edges * MINUTE).tolist()]
    return [f"{begin} … {end}" for begin, end in zip(shown[::2], shown[1::2], strict=True)]


# -- weekly -----------------------------------------------------------------------------------------------------------


def test_a_weekly_window_has_its_start_and_not_its_end() -> None:
    window = Weekly((0,), 9 * 60, 17 * 60)
    assert active(window, "2026-11-23T08:59:59.999", "2026-11-23T09:00", "2026-11-23T16:59:59.999") == [0, 1, 1]
    assert active(window, "2026-11-23T17:00", "2026-11-24T09:00", "2026-11-30T09:00") == [0, 0, 1]


def test_a_window_over_midnight_belongs_to_the_day_it_starts() -> None:
    window = Weekly((6,), 22 * 60, 2 * 60)  # Sunday
    assert open_times(window, "2026-11-20T00:00", "2026-11-27T00:00") == ["11-22T22:00 … 11-23T02:00"]


def test_a_window_whose_ends_are_equal_lasts_a_day() -> None:
    assert open_times(Weekly((2,), 360, 360), "2026-11-23T00:00", "2026-11-29T00:00") == ["11-25T06:00 … 11-26T06:00"]
    assert open_times(Weekly((2,), 0, 0), "2026-11-23T00:00", "2026-11-29T00:00") == ["11-25T00:00 … 11-26T00:00"]
    assert open_times(Weekly((2,), 0, 1440), "2026-11-23T00:00", "2026-11-29T00:00") == ["11-25T00:00 … 11-26T00:00"]
    assert open_times(Weekly((2,), 1320, 0), "2026-11-23T00:00", "2026-11-29T00:00") == ["11-25T22:00 … 11-26T00:00"]


@pytest.mark.parametrize(
    ("start", "end", "stretches"),
    [
        ((1, 0), (4, 0), ["03-29T00:00 … 03-29T02:00"]),  # three hours by the clock, two that pass
        ((2, 0), (3, 0), []),  # no clock shows it
        ((2, 15), (2, 45), []),
        ((2, 30), (4, 0), ["03-29T01:00 … 03-29T02:00"]),  # from 03:00, the first time the clocks show in it
        ((1, 30), (2, 30), ["03-29T00:30 … 03-29T01:00"]),  # up to where they jump
        ((22, 0), (2, 30), ["03-28T21:00 … 03-29T01:00", "03-29T20:00 … 03-30T00:30"]),
    ],
)
def test_a_local_time_that_spring_skips(start: tuple[int, int], end: tuple[int, int], stretches: list[str]) -> None:
    window = Weekly(ALL_DAYS, start[0] * 60 + start[1], end[0] * 60 + end[1], BERLIN)
    first = "2026-03-28T12:00" if start[0] > 12 else "2026-03-28T23:00"
    last = "2026-03-30T12:00" if start[0] > 12 else "2026-03-29T22:00"
    assert open_times(window, first, last) == stretches


@pytest.mark.parametrize(
    ("start", "end", "stretches"),
    [
        ((1, 0), (4, 0), ["10-24T23:00 … 10-25T03:00"]),  # three hours by the clock, four that pass
        ((2, 0), (3, 0), ["10-25T00:00 … 10-25T02:00"]),
        ((2, 15), (2, 45), ["10-25T00:15 … 10-25T00:45", "10-25T01:15 … 10-25T01:45"]),  # both times
        ((1, 0), (2, 30), ["10-24T23:00 … 10-25T00:30", "10-25T01:00 … 10-25T01:30"]),
        ((2, 30), (4, 0), ["10-25T00:30 … 10-25T01:00", "10-25T01:30 … 10-25T03:00"]),
    ],
)
def test_a_local_time_that_autumn_repeats(start: tuple[int, int], end: tuple[int, int], stretches: list[str]) -> None:
    window = Weekly(ALL_DAYS, start[0] * 60 + start[1], end[0] * 60 + end[1], BERLIN)
    assert open_times(window, "2026-10-24T22:00", "2026-10-25T22:00") == stretches


def test_windows_keep_to_the_local_clock_through_the_year() -> None:
    window = Weekly(ALL_DAYS, 22 * 60, 23 * 60, BERLIN)
    assert active(window, "2026-01-10T21:30", "2026-01-10T20:30", "2026-07-10T20:30", "2026-07-10T21:30") == [
        1,
        0,
        1,
        0,
    ]


@pytest.mark.parametrize(
    "zone",
    [
        "Australia/Lord_Howe",  # half an hour of summer
        "Africa/Casablanca",  # winter time in Ramadan
        "Africa/Monrovia",  # until 1972 off by 44 min 30 s
        "Pacific/Apia",  # left out a day in 2011
        "America/Havana",  # sets the clock back over midnight
        "Asia/Kathmandu",
        "America/St_Johns",
        "Antarctica/Troll",  # two hours
        "UTC",
    ],
)
def test_local_time_is_that_of_zoneinfo(zone: str) -> None:
    times: Int64Array = np.random.default_rng(1).integers(0, utc("2040-01-01"), 4_000)
    expected = [
        round((datetime.fromtimestamp(ms // 1000, ZoneInfo(zone)).replace(tzinfo=UTC)).timestamp() * 1000) + ms % 1000
        for ms in times.tolist()
    ]
    assert local_ms(times, zone).tolist() == expected


def test_times_beyond_all_years_do_no_harm() -> None:
    times = np.array([-(2**63), -(10**15), -1, 0, 10**15, 2**63 - 1], np.int64)
    assert len(Weekly((0,), 0, 60, BERLIN).active(times)) == len(times)
    assert len(Once(0, 1).active(times)) == len(times)
    assert not Weekly((0,), 0, 60, BERLIN).active(times[:0]).size


def test_times_need_no_order() -> None:
    times = np.array([utc("2026-07-10T20:30"), utc("1999-01-10T21:30"), utc("2026-01-10T20:30")], np.int64)
    assert Weekly(ALL_DAYS, 22 * 60, 23 * 60, BERLIN).active(times).tolist() == [True, True, False]


# -- once -------------------------------------------------------------------------------------------------------------


def test_a_single_window_has_its_start_and_not_its_end() -> None:
    window = Once(1_000, 2_000)
    assert window.active(np.array([999, 1_000, 1_999, 2_000])).tolist() == [False, True, True, False]


def test_a_local_time_is_an_instant() -> None:
    assert instant_ms(datetime.fromisoformat("2026-11-22T20:00"), BERLIN) == utc("2026-11-22T19:00")
    assert instant_ms(datetime.fromisoformat("2026-07-22T20:00"), BERLIN) == utc("2026-07-22T18:00")
    assert instant_ms(datetime.fromisoformat("2026-03-29T03:00"), BERLIN) == utc("2026-03-29T01:00")


@pytest.mark.parametrize(
    ("local", "zone", "message"),
    [
        (datetime.fromisoformat("2026-03-29T02:30"), BERLIN, "never shows on a clock in Europe/Berlin"),
        (
            datetime.fromisoformat("2026-10-25T02:30"),
            BERLIN,
            r"shows twice .* write 2026-10-25T02:30\+02:00 or 2026-10-25T02:30\+01:00",
        ),
        (datetime.fromisoformat("2011-12-30T12:00"), "Pacific/Apia", "never shows"),
    ],
)
def test_a_local_time_that_is_none_or_two_is_refused(local: datetime, zone: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instant_ms(local, zone)


# -- calendars --------------------------------------------------------------------------------------------------------

VTIMEZONE = """BEGIN:VTIMEZONE
TZID:Ours
BEGIN:STANDARD
DTSTART:19701025T030000
TZOFFSETFROM:+0200
TZOFFSETTO:+0100
RRULE:FREQ=YEARLY;BYMONTH=10;BYDAY=-1SU
END:STANDARD
BEGIN:DAYLIGHT
DTSTART:19700329T020000
TZOFFSETFROM:+0100
TZOFFSETTO:+0200
RRULE:FREQ=YEARLY;BYMONTH=3;BYDAY=-1SU
END:DAYLIGHT
END:VTIMEZONE"""


def event(*lines: str, uid: str = "1") -> str:
    return "\n".join(["BEGIN:VEVENT", f"UID:{uid}", *lines, "END:VEVENT"])


def ics(*parts: str) -> bytes:
    text = "\n".join(["BEGIN:VCALENDAR", "VERSION:2.0", "PRODID:-//test//", *parts, "END:VCALENDAR", ""])
    return text.replace("\n", "\r\n").encode()


@pytest.mark.parametrize(
    ("parts", "stretches"),
    [
        pytest.param(
            [event("DTSTART:20261103T100000Z", "DTEND:20261103T113000Z")], ["11-03T10:00 … 11-03T11:30"], id="once"
        ),
        pytest.param(
            [event("DTSTART:20261103T100000Z", "DURATION:PT90M")], ["11-03T10:00 … 11-03T11:30"], id="DURATION"
        ),
        pytest.param(
            [event(f"DTSTART;TZID={BERLIN}:20261103T100000", f"DTEND;TZID={BERLIN}:20261103T110000")],
            ["11-03T09:00 … 11-03T10:00"],
            id="a zone of IANA's",
        ),
        pytest.param(
            [VTIMEZONE, event("DTSTART;TZID=Ours:20261103T100000", "DTEND;TZID=Ours:20261103T110000")],
            ["11-03T09:00 … 11-03T10:00"],
            id="VTIMEZONE",
        ),
        pytest.param(
            [event("DTSTART:20261103T100000", "DTEND:20261103T110000")],
            ["11-03T09:00 … 11-03T10:00"],
            id="no zone: that of the rule",
        ),
        pytest.param(
            [event("DTSTART;VALUE=DATE:20261103")], ["11-02T23:00 … 11-03T23:00"], id="a day, in the zone of the rule"
        ),
        pytest.param(
            [event("DTSTART;VALUE=DATE:20261103", "DTEND;VALUE=DATE:20261106")],
            ["11-02T23:00 … 11-05T23:00"],
            id="days",
        ),
        pytest.param(
            [
                event(
                    f"DTSTART;TZID={BERLIN}:20200106T220000",
                    "DURATION:PT4H",
                    "RRULE:FREQ=WEEKLY;BYDAY=MO,WE",
                    f"EXDATE;TZID={BERLIN}:20261109T220000",
                )
            ],
            [
                "11-02T21:00 … 11-03T01:00",
                "11-04T21:00 … 11-05T01:00",
                "11-11T21:00 … 11-12T01:00",
                "11-16T21:00 … 11-17T01:00",
                "11-18T21:00 … 11-19T01:00",
                "11-23T21:00 … 11-24T01:00",
                "11-25T21:00 … 11-26T01:00",
            ],
            id="RRULE and EXDATE",
        ),
        pytest.param(
            [
                event("DTSTART:20261102T100000Z", "DURATION:PT1H", "RRULE:FREQ=DAILY;COUNT=3"),
                event("RECURRENCE-ID:20261103T100000Z", "DTSTART:20261103T150000Z", "DURATION:PT2H"),
            ],
            ["11-02T10:00 … 11-02T11:00", "11-03T15:00 … 11-03T17:00", "11-04T10:00 … 11-04T11:00"],
            id="one of a series moved",
        ),
        pytest.param(
            [
                event("DTSTART:20261102T100000Z", "DURATION:PT1H", "RRULE:FREQ=DAILY;COUNT=3"),
                event(
                    "RECURRENCE-ID:20261103T100000Z", "DTSTART:20261103T100000Z", "DURATION:PT1H", "STATUS:CANCELLED"
                ),
            ],
            ["11-02T10:00 … 11-02T11:00", "11-04T10:00 … 11-04T11:00"],
            id="one of a series cancelled",
        ),
        pytest.param(
            [event("DTSTART:20261102T100000Z", "DURATION:PT1H", "RDATE:20261110T100000Z")],
            ["11-02T10:00 … 11-02T11:00", "11-10T10:00 … 11-10T11:00"],
            id="RDATE",
        ),
        pytest.param(
            [
                event("DTSTART:20261103T100000Z", "DTEND:20261103T113000Z"),
                event("DTSTART:20261103T110000Z", "DTEND:20261103T120000Z", uid="2"),
                event("DTSTART:20261103T103000Z", "DTEND:20261103T104500Z", uid="3"),
            ],
            ["11-03T10:00 … 11-03T12:00"],
            id="events that overlap",
        ),
        pytest.param(
            [event("DTSTART:20261015T000000Z", "DTEND:20261210T000000Z")],
            ["11-01T00:00 … 11-30T00:00"],
            id="longer than a month",
        ),
        pytest.param(
            [
                event(
                    "DTSTART:20260101T100000Z", "DURATION:PT1H", "RRULE:FREQ=MONTHLY;BYDAY=-1SA;UNTIL=20261231T000000Z"
                )
            ],
            ["11-28T10:00 … 11-28T11:00"],
            id="the last Saturday, UNTIL",
        ),
    ],
)
def test_events_are_windows(parts: list[str], stretches: list[str]) -> None:
    assert open_times(Calendar.parse(ics(*parts), BERLIN), "2026-11-01T00:00", "2026-11-30T00:00") == stretches


def test_a_repeated_event_keeps_to_the_local_clock() -> None:
    daily = event(f"DTSTART;TZID={BERLIN}:20260101T023000", "DURATION:PT30M", "RRULE:FREQ=DAILY")
    calendar = Calendar.parse(ics(daily))
    assert open_times(calendar, "2026-03-28T00:00", "2026-03-31T00:00") == [
        "03-28T01:30 … 03-28T02:00",
        "03-29T01:30 … 03-29T02:00",  # 02:30 is skipped: by the offset before it is 03:30
        "03-30T00:30 … 03-30T01:00",
    ]
    assert open_times(calendar, "2026-10-24T00:00", "2026-10-27T00:00") == [
        "10-24T00:30 … 10-24T01:00",
        "10-25T00:30 … 10-25T02:00",  # from the first 02:30 to 03:00, which shows once
        "10-26T01:30 … 10-26T02:00",
    ]


def test_a_calendar_is_expanded_for_any_time_that_points_have() -> None:
    calendar = Calendar.parse(ics(event("DTSTART;VALUE=DATE:20200101", "RRULE:FREQ=YEARLY", "SUMMARY:New Year")))
    times = np.array([-(2**63), utc("2019-01-01"), utc("2199-01-01T12:00"), utc("2026-01-01"), 2**63 - 1], np.int64)
    assert calendar.active(times).tolist() == [False, False, True, True, False]
    assert calendar.active(times[:0]).tolist() == []


def test_calendars_of_equal_content_are_equal() -> None:
    data = ics(event("DTSTART;VALUE=DATE:20200101"))
    assert Calendar.parse(data) == Calendar.parse(data) != Calendar.parse(data, BERLIN)


ONE = event("DTSTART:20261103T100000Z", "DURATION:PT1H")
HOURS, MINUTES = (",".join(map(str, range(count))) for count in (24, 60))


def repeated(rule: str) -> str:
    return event("DTSTART:20261103T100000Z", "DURATION:PT1M", rule)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty: an iCalendar file begins with BEGIN:VCALENDAR"),
        (b" \r\n\r\n", "is empty"),
        (b"x" * (2**20 + 1), "is larger than 1,048,576 bytes"),
        (ics(ONE).replace(b"test", b"\xff"), "line 3: is not UTF-8"),
        (b"hello", "is no iCalendar file: "),
        (ics(ONE)[:100], "is no iCalendar file: "),
        (b"BEGIN:VCALENDAR\r\n" * 500, "is no iCalendar file: "),
        (ics(), "holds no event"),
        (ics(VTIMEZONE), "holds no event"),
        (ics(*[ONE] * 5_001), "holds 5,001 events, at most 5,000"),
        (ics(event("SUMMARY:Backup")), r"event 1 \('Backup'\) has no DTSTART"),
        (ics(event("DTSTART:garbage", "DURATION:PT1H")), "event 1 .*garbage"),
        (
            ics(ONE, event("DTSTART;TZID=Mars/Base:20261103T100000", "DURATION:PT1H")),
            "event 2 .*'Mars/Base', which neither",
        ),
        (ics(event("DTSTART:20261103T100000Z", "DTEND:20261103T090000Z")), "event 1 ends before it starts, 2026-11-03"),
        (ics(event("DTSTART:20261103T100000Z", "DURATION:-PT1H")), "event 1 ends before it starts"),
        (ics(event("DTSTART:20261103T100000Z", "DTEND;VALUE=DATE:20261104")), "starts at a time and ends on a day"),
        (ics(event("DTSTART:20261103T100000Z", "DTEND:20261103T110000")), "has a zone at one of its ends only"),
        (ics(event("DTSTART:16010101T000000Z", "DURATION:PT1H")), "has a DTSTART in 1601, outside 1900 ... 2199"),
        (ics(event("DTSTART:20261103T100000Z")), "mutes nothing: each of its 1 events is cancelled or has no length"),
        (ics(event("DTSTART;VALUE=DATE:20261103", "STATUS:CANCELLED")), "mutes nothing"),
        (ics(repeated("RRULE:FREQ=MINUTELY")), "line 8: 'FREQ=MINUTELY' repeats minutely: no maintenance does"),
        (ics(repeated("RRULE:FREQ=SEC\n ONDLY;COUNT=5")), "repeats secondly"),
        (ics(repeated("RRULE;X-A=1:INTERVAL=5;FREQ=hourly")), "repeats hourly"),
        (ics(VTIMEZONE.replace("YEARLY", "DAILY"), ONE), r"line 10: .* in a VTIMEZONE: clocks change by FREQ=YEARLY"),
        (ics(repeated("RRULE:FREQ=OFTEN")), "event 1 has a damaged RRULE"),
        (ics(repeated("RRULE:FREQ=DAILY;BYMONTH=2;BYMONTHDAY=30")), "event 1 has a rule that never happens"),
        (
            ics(repeated(f"RRULE:FREQ=DAILY;BYMINUTE={MINUTES};BYHOUR={HOURS}")),
            "event 1 makes it more than 200 occurrences a day",
        ),
        (ics(*[repeated("RRULE:FREQ=YEARLY")] * 501), "event 501 is the 501th that repeats, at most 500 may"),
    ],
)
def test_a_bad_calendar_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Calendar.parse(data)


def test_an_endless_rule_costs_a_bounded_time() -> None:
    rule = f"RRULE:FREQ=DAILY;BYHOUR={HOURS};BYMINUTE=0,15,30,45"
    calendar = Calendar.parse(ics(event("DTSTART:20260101T000000Z", "DURATION:PT5M", rule)))
    begun = datetime.now(UTC)
    assert calendar.active(np.array([utc("2026-11-22T10:16")])).tolist() == [True]
    assert datetime.now(UTC) - begun < timedelta(seconds=20)


def test_a_calendar_that_fails_in_a_later_month_mutes_nothing() -> None:
    class Broken:
        def between(self, start: datetime, end: datetime) -> None:
            raise ValueError("month out of range")

    calendar = Calendar(ics(ONE), _query=Broken())
    assert active(calendar, "2026-11-03T10:30") == [False]


def test_without_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "recurring_ical_events", None)
    with pytest.raises(ConfigError, match=r"needs the extra `calendar`: pip install 'tocsin\[calendar\]'"):
        Calendar.parse(ics(ONE))


def test_the_extra_is_there() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert "\ncalendar = [" in text
