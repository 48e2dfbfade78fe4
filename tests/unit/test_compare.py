from stream.compare import Only, compare_models, in_shadow
from stream.events import Event, iso_time
from tests.helpers import MINUTE, T0, Persistence, columns, config, normal_points
from tests.unit.test_shadow import FIRST, SECOND, fed, made


def said(far: set[int], name: str = "a") -> list[Event]:
    live = config(model=Persistence()).detector()
    points = [(name, t, 500.0 if k in far else v) for k, (_, t, v) in enumerate(normal_points(300, name=name))]
    return live.accept(columns(live, points)).events


def at(k: int) -> str:
    return iso_time(T0 + k * MINUTE)


def test_the_same_events_differ_in_nothing() -> None:
    events = said({100, 200})
    found = compare_models("a@1", "a@2", events, events)
    assert (found.kpis, found.earlier, found.later, found.only_first, found.only_second) == (1, 0, 0, (), ())
    assert found.both >= 2


def test_what_one_of_them_reports_is_told_with_its_time() -> None:
    found = compare_models("a@1", "a@2", said({100}), said({200}, name="b"))
    assert found.kpis == 2 and found.both == 0
    assert Only("a", at(100), at(100)) in found.only_first, "it ends with its last anomalous point"
    assert Only("b", at(200), at(200)) in found.only_second
    assert {one.kpi for one in found.only_first} == {"a"} and {one.kpi for one in found.only_second} == {"b"}


def test_which_one_was_earlier() -> None:
    first, second = said({100, 101, 102}), said({101, 102})
    found = compare_models("a@1", "a@2", first, second)
    assert found.later == 1 and found.earlier == 0
    assert compare_models("a@2", "a@1", second, first).earlier == 1


def test_what_was_published_before_the_shadow_is_left_out() -> None:
    result = fed(made(FIRST, SECOND))
    assert in_shadow(result.events, result.shadow) and in_shadow(result.events, []) == result.events
    later = result.shadow[-1:]
    assert all(event.time >= later[0].time for event in in_shadow(result.events, later))
