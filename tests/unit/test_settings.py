from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from stream.errors import ConfigError
from stream.policy import Policy
from stream.results import DetectorConfig
from stream.settings import PREFIX, Settings, _explain, known_names, load_settings
from tests.certificates import Authority

SECRET = "hunter2-and-more"


def test_without_any_variable_the_defaults_hold() -> None:
    assert load_settings({}) == Settings()
    assert load_settings({"PATH": "/bin", "HOME": "/", "XTOCSIN_Y": "1", "TOCSIN": "1"}) == Settings()


def test_the_environment_given_is_the_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOCSIN_SOURCE", "the-process")
    assert load_settings().source == "the-process"
    assert load_settings({}).source == "tocsin"
    assert load_settings({"TOCSIN_SOURCE": "an-argument"}).source == "an-argument"
    assert Settings().source == "tocsin", "the process is read by load_settings only"


def test_every_kind_of_value_is_read() -> None:
    settings = load_settings(
        {
            "TOCSIN_KAFKA__BOOTSTRAP_SERVERS": "a:9092,b:9092",
            "TOCSIN_KAFKA__PARTITIONS": "12",
            "TOCSIN_REDIS__URL": f"redis://:{SECRET}@host:6379/0",
            "TOCSIN_POT__Q": "1e-3",
            "TOCSIN_CHECKPOINTS": "/srv/models",
            "TOCSIN_INTERVAL_S": "60",
            "TOCSIN_LOG_LEVEL": "DEBUG",
        }
    )
    assert settings.kafka.bootstrap_servers == "a:9092,b:9092"
    assert settings.kafka.partitions == 12
    assert settings.redis.url.get_secret_value() == f"redis://:{SECRET}@host:6379/0"
    assert settings.pot.q == 1e-3
    assert settings.checkpoints == Path("/srv/models")
    assert settings.interval_s == 60.0
    assert settings.log_level == "DEBUG"


def test_one_field_of_a_section_leaves_the_others() -> None:
    settings = load_settings({"TOCSIN_KAFKA__GROUP": "other", "TOCSIN_POT__LEVEL": "0.97"})
    assert settings.kafka == Settings().kafka.model_copy(update={"group": "other"})
    assert settings.pot == Settings().pot.model_copy(update={"level": 0.97})
    assert settings.redis == Settings().redis


def test_case_does_not_matter() -> None:
    assert load_settings({"tocsin_kafka__Group": "g"}).kafka.group == "g"


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("TOCSIN_INTERVALS", "TOCSIN_INTERVAL_S"),
        ("TOCSIN_POT__LEVL", "TOCSIN_POT__LEVEL"),
        ("TOCSIN_REDIS_URL", "TOCSIN_REDIS__URL"),
        ("TOCSIN_KAFKA_BOOTSTRAP_SERVERS", "TOCSIN_KAFKA__BOOTSTRAP_SERVERS"),
        ("tocsin_chekpoint", "TOCSIN_CHECKPOINT"),
        ("TOCSIN_KAFKA__GROUP__ID", "TOCSIN_KAFKA__GROUP"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(variable: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"^{variable}: there is no such setting; did you mean {nearest}\\?$") as e:
        load_settings({variable: SECRET})
    assert SECRET not in str(e.value)


@pytest.mark.parametrize("variable", ["TOCSIN_", "TOCSIN_KAFKA", "TOCSIN_POT", "TOCSIN_XYZZY_QUUX"])
def test_a_section_or_nonsense_is_no_setting(variable: str) -> None:
    with pytest.raises(ConfigError, match=f"^{variable}: there is no such setting"):
        load_settings({variable: '{"group": "x"}'})


def test_the_variables_of_the_tests_are_left_alone() -> None:
    assert load_settings({"TOCSIN_TEST_DATA": "/data", "TOCSIN_TEST_ANYTHING": ""}) == Settings()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TOCSIN_KAFKA__PARTITIONS", "six", "TOCSIN_KAFKA__PARTITIONS='six': Input should be a valid integer"),
        ("TOCSIN_KAFKA__PARTITIONS", "0", "TOCSIN_KAFKA__PARTITIONS='0': Input should be greater than or equal to 1"),
        ("TOCSIN_KAFKA__GROUP", "", "TOCSIN_KAFKA__GROUP='': String should have at least 1 character"),
        ("TOCSIN_INTERVAL_S", "", "TOCSIN_INTERVAL_S='': Input should be a valid number"),
        ("TOCSIN_INTERVAL_S", "inf", "TOCSIN_INTERVAL_S='inf': Input should be a finite number"),
        ("TOCSIN_WARMUP_H", "nan", "TOCSIN_WARMUP_H='nan': Input should be a finite number"),
        ("TOCSIN_ACCEPT_AFTER_H", "-1", "TOCSIN_ACCEPT_AFTER_H='-1': Input should be greater than 0"),
        ("TOCSIN_MIN_OBSERVED", "1.5", "TOCSIN_MIN_OBSERVED='1.5': Input should be less than or equal to 1"),
        ("TOCSIN_LOG_LEVEL", "LOUD", "TOCSIN_LOG_LEVEL='LOUD': String should match pattern"),
        ("TOCSIN_SOURCE", "my source", "TOCSIN_SOURCE='my source': String should match pattern"),
        ("TOCSIN_POT__Q", "2", "TOCSIN_POT__Q='2': Input should be less than 1"),
        ("TOCSIN_POT__Q", "0.019", "TOCSIN_POT: q=0.019 must be at most"),
        ("TOCSIN_POT__MIN_SCORES", "10", "TOCSIN_POT: min_scores=10 must be at least 2 min_excess = 40"),
    ],
)  # fmt: skip
def test_a_bad_value_names_its_variable(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        load_settings({variable: value})
    assert str(e.value).startswith(message)
    assert e.value.exit_code == 2


def test_all_bad_values_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"TOCSIN_KAFKA__PARTITIONS='x': .*; TOCSIN_INTERVAL_S='y': ") as e:
        load_settings({"TOCSIN_KAFKA__PARTITIONS": "x", "TOCSIN_INTERVAL_S": "y"})
    assert "\n" not in str(e.value)


SASL = {
    "TOCSIN_KAFKA__SECURITY_PROTOCOL": "SASL_SSL",
    "TOCSIN_KAFKA__SASL_MECHANISM": "PLAIN",
    "TOCSIN_KAFKA__SASL_USERNAME": "u",
}
COMPANIONS = {  # what has to be set with a secret
    "TOCSIN_KAFKA__SASL_PASSWORD": SASL,
    "TOCSIN_KAFKA__SSL_KEYPASSWORD": {"TOCSIN_KAFKA__SECURITY_PROTOCOL": "SSL", "TOCSIN_KAFKA__SSL_CERTFILE": "PEM"},
    "TOCSIN_REDIS__PASSWORD": {"TOCSIN_REDIS__URL": "redis://host"},
    "TOCSIN_REDIS__SSL_KEYPASSWORD": {"TOCSIN_REDIS__URL": "rediss://host", "TOCSIN_REDIS__SSL_CERTFILE": "PEM"},
}


def secrets() -> list[str]:
    return [name for name, _, default in known_names() if isinstance(default, SecretStr)]


def test_there_are_secrets_to_keep() -> None:
    assert "TOCSIN_REDIS__URL" in secrets()


@pytest.mark.parametrize("variable", secrets())
def test_a_secret_shows_nowhere(variable: str, tmp_path: Path) -> None:
    pem = Authority.new(tmp_path).client("tocsin", password=SECRET)
    beside = {name: value.replace("PEM", pem) for name, value in COMPANIONS.get(variable, {}).items()}
    settings = load_settings({variable: SECRET, **beside})
    assert SECRET not in repr(settings) + str(settings) + settings.model_dump_json() + repr(settings.model_dump())
    for wrong in ("TOCSIN_KAFKA__PARTITIONS", "TOCSIN_REDIS__FLUSH_INTERVAL_S", "TOCSIN_NO_SUCH"):
        with pytest.raises(ConfigError) as e:
            load_settings({variable: SECRET, wrong: "x", **beside})
        assert SECRET not in str(e.value) + repr(e.value)
        assert e.value.__cause__ is None
        assert e.value.__context__ is None or e.value.__suppress_context__, "a traceback would show pydantic's message"
    assert SECRET not in str(list(known_names()))


def test_a_secret_of_a_wrong_type_shows_nowhere() -> None:
    with pytest.raises(ValidationError) as e:
        Settings.model_validate({"redis": {"url": [SECRET]}})
    assert _explain(e.value) == "TOCSIN_REDIS__URL: Input should be a valid string"


def test_every_setting_says_what_it_is() -> None:
    names = [name for name, _, _ in known_names()]
    assert len(set(names)) == len(names) > 20
    for name, description, _ in known_names():
        assert name.startswith(PREFIX)
        assert description.endswith("."), name
        assert len(description) > 10, name


def test_every_default_can_be_given_as_its_variable() -> None:
    environ = {name: str(default) for name, _, default in known_names() if not isinstance(default, SecretStr)}
    assert load_settings(environ) == Settings()


def test_settings_do_not_change() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, "source", "x")  # noqa: B010
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings.kafka, "group", "x")  # noqa: B010


def test_the_core_gets_what_was_set() -> None:
    settings = load_settings(
        {
            "TOCSIN_INTERVAL_S": "0.5",
            "TOCSIN_WARMUP_H": "1",
            "TOCSIN_ACCEPT_AFTER_H": "2",
            "TOCSIN_RECOVER_AFTER": "5",
            "TOCSIN_LATENESS_S": "90",
            "TOCSIN_SILENT_AFTER": "7",
            "TOCSIN_MIN_OBSERVED": "0.5",
            "TOCSIN_SOURCE": "/x",
            "TOCSIN_POT__Q": "1e-3",
            "TOCSIN_POT__LEVEL": "0.9",
            "TOCSIN_POT__MIN_SCORES": "99",
        }
    )
    config, policy = settings.detector(), settings.policy()
    assert (policy.interval_ms, policy.warmup_ms, policy.accept_after_ms) == (500, 3_600_000, 7_200_000)
    assert (policy.recover_after, policy.lateness_ms, policy.silent_after, policy.q) == (5, 90_000, 7, 1e-3)
    assert (config.min_observed, config.source) == (0.5, "/x")
    assert (config.pot.q, config.pot.level, config.pot.min_scores) == (1e-3, 0.9, 99)


def test_the_defaults_are_those_of_the_core() -> None:
    assert Settings().policy() == Policy(silent_after=Settings().silent_after)
    assert Settings().detector() == DetectorConfig(series_max=Settings().series_max)
