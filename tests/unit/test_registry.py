import logging
from pathlib import Path

import pytest

from models import repository
from models.checkpoint import CONFIG, WEIGHTS
from models.pot import PotConfig
from stream.errors import CheckpointError, ConfigError
from stream.policy import Rule
from stream.registry import Registry, features_of
from tests.unit.test_checkpoint import bundle, named, stack


def registry(*roots: Path, default: str = "m") -> Registry:
    return Registry(roots, default, PotConfig(), source="rules.yaml")


def test_what_is_in_use_is_read_once_and_let_go(tmp_path: Path) -> None:
    for name in ("m", "other"):
        repository.save(tmp_path, name, bundle())
    models = registry(tmp_path)
    both = models.choose([Rule(), Rule(model="other"), Rule(watch=False)])
    again = models.choose([Rule(model="other"), Rule()])
    assert again.served == (both.served[1], both.served[0]) and both.served[2] is None
    assert again.served[0] is both.served[1]
    assert features_of([Rule(model="other"), Rule()], again) == {"other": 1, "": 1}
    models.choose([Rule()])
    assert models.choose([Rule(model="other")]).served[0] is not both.served[1]


def test_another_version_is_noticed_once_it_holds_still(tmp_path: Path) -> None:
    repository.save(tmp_path, "m", bundle(0))
    models = registry(tmp_path)
    assert [one.ref for one in models.choose([Rule()]).served if one] == ["m@1"]
    assert not models.changed() and not models.changed()
    repository.save(tmp_path, "m", bundle(1))
    assert not models.changed(), "the first look that finds it"
    assert models.changed()
    assert [one.ref for one in models.choose([Rule()]).served if one] == ["m@2"]
    assert not models.changed()
    repository.promote(tmp_path, "m@1")
    assert not models.changed() and models.changed()
    assert [one.ref for one in models.choose([Rule()]).served if one] == ["m@1"]


def test_what_cannot_be_used_is_told_with_the_rule_that_asks_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = repository.save(tmp_path, "m", bundle())
    (path / WEIGHTS).write_bytes(b"damaged")
    repository.save(tmp_path, "sound", bundle())
    rules, shadowed = [Rule(model="m", name="web", line=7)], [Rule(model="sound", shadow="gone", name="x", line=3)]
    with pytest.raises(CheckpointError, match=r"rules.yaml:7: rule 'web': model: .*its SHA-256"):
        registry(tmp_path).choose(rules, strict=True)
    with pytest.raises(ConfigError, match=r"rules.yaml:3: rule 'x': shadow: no checkpoint 'gone'"):
        Registry([tmp_path], "sound", PotConfig(), source="rules.yaml").choose(shadowed, strict=True)
    with caplog.at_level(logging.ERROR):
        chosen = registry(tmp_path).choose(rules)
        assert registry(tmp_path).choose(shadowed).shadows == (None,)
    assert chosen.served == (chosen.general,) and chosen.general.ref == "deepant@1"
    assert "model m cannot be used, deepant@1 goes on in its place" in caplog.text
    assert "model gone cannot be used" in caplog.text


def test_a_default_that_is_not_there_is_a_wrong_setting_one_that_is_damaged_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint 'm'"):
        registry(tmp_path).choose([Rule()])
    (repository.save(tmp_path, "m", bundle()) / CONFIG).write_text("{}")
    chosen = registry(tmp_path).choose([Rule()])
    assert chosen.served == (chosen.general,)


def test_a_shadow_must_take_the_same_points(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    repository.save(tmp_path, "m", bundle())
    repository.save(tmp_path, "wide", named(("a", "b", "c")))
    repository.save(tmp_path, "many", stack())
    for shadow, problem in (("wide", "takes other metrics than m@1"), ("many", "is a stack")):
        with pytest.raises(ConfigError, match=f"shadow {shadow}@1 {problem}"):
            registry(tmp_path).choose([Rule(shadow=shadow)], strict=True)
        with caplog.at_level(logging.ERROR):
            chosen = registry(tmp_path).choose([Rule(shadow=shadow)])
        assert chosen.shadows == (None,) and problem in caplog.text
    both = registry(tmp_path).choose([Rule(model="many", shadow="many"), Rule(shadow="m@1")])
    assert [one.ref for one in both.shadows if one] == ["many@1", "m@1"]
    assert both.served[0] is not None and both.served[0].members == {"checkout.p99": 0, "Größe / m³": 1}
    assert len(both.served[0].calibrations) == 2 and both.served[0].prior is None
