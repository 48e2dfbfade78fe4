"""Settings: `TOCSIN_…` environment variables, `__` between a section and its field. Unknown names are refused.

Settings are read once, at start, and passed down as values; the core never imports this module.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from models.pot import PotConfig
from models.repository import bundled_root
from stream.errors import ConfigError
from stream.policy import HOUR_MS, Policy
from stream.results import DetectorConfig
from stream.security import check_kafka, read_secret, redis_options

PREFIX = "TOCSIN_"
FILE = "_FILE"  # a secret setting with this behind its name gives the file that holds the value
SILENT_AFTER = 30  # intervals: the window of the bundled model, which has nothing to go by after them
RESERVED = "TOCSIN_TEST_"  # the tests' own variables

S = TypeVar("S", bound=BaseModel)


def _refuse(check: Callable[[S], object], settings: S) -> None:
    try:
        check(settings)
    except ConfigError as e:
        raise ValueError(str(e)) from None


class Section(BaseModel):
    """A group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class KafkaSettings(Section):
    """The broker."""

    bootstrap_servers: str = Field("", description="Kafka brokers, host:port,…; empty: those of a running `tocsin up`.")
    group: str = Field("tocsin", min_length=1, description="Consumer group; also the prefix of the transactional ids.")
    instance: str = Field("", description="Static group member id of this worker; empty: a dynamic member.")
    points_topic: str = Field("kpi.points", min_length=1, description="Topic that points are read from.")
    anomalies_topic: str = Field("kpi.anomalies", min_length=1, description="Topic that events are published to.")
    shadow_topic: str = Field(
        "kpi.shadow", min_length=1, description="Topic for the events of models that judge beside the first."
    )
    rejects_topic: str = Field("kpi.rejects", min_length=1, description="Topic for records that cannot be read.")
    partitions: int = Field(6, ge=1, description="Partitions of a topic that does not exist yet and is created.")
    replication: int = Field(-1, ge=-1, description="Replication of a created topic; -1: the broker's default.")
    connect_timeout_s: float = Field(30.0, gt=0, description="How long to try to reach the broker at start, seconds.")
    max_poll_records: int = Field(20_000, ge=1, description="Points in one batch, at most.")
    settle_interval_ms: int = Field(50, ge=0, description="Least time between two transactions of a partition, ms.")
    delivery: Literal["exactly_once", "at_least_once"] = Field(
        "exactly_once", description="exactly_once; at_least_once for a broker without transactions."
    )
    unsettled_max: int = Field(100_000, ge=1, description="Points of a partition read but not settled; then it pauses.")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL, as the broker's listener has it."
    )
    sasl_mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = Field(
        "", description="PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER; needed with SASL."
    )
    sasl_username: str = Field("", description="User, for PLAIN and SCRAM.")
    sasl_password: SecretStr = Field(SecretStr(""), description="Password, for PLAIN and SCRAM.")
    sasl_token_file: str = Field(
        "", description="File that holds the token, for OAUTHBEARER; read again for each connection."
    )
    ssl_cafile: str = Field(
        "", description="CA certificates, PEM, that the broker's must come from; empty: the system's."
    )
    ssl_certfile: str = Field("", description="Certificate of this client, PEM, with its chain; empty: none.")
    ssl_keyfile: str = Field("", description="Its private key, PEM; empty: in the same file.")
    ssl_keypassword: SecretStr = Field(SecretStr(""), description="Password of the private key.")
    ssl_check_hostname: bool = Field(True, description="Whether the broker's certificate must bear its host name.")

    @model_validator(mode="after")
    def _security_fits_together(self) -> Self:
        _refuse(check_kafka, self)
        return self

    def without_security(self, bootstrap_servers: str) -> Self:
        """Return the same for another broker, one that lets everyone in."""
        kept = {name for name in type(self).model_fields if not name.startswith(("security_", "sasl_", "ssl_"))}
        return type(self)(**self.model_dump(include=kept) | {"bootstrap_servers": bootstrap_servers})


class RedisSettings(Section):
    """The state store."""

    url: SecretStr = Field(SecretStr(""), description="Redis URL, redis://host:port/db; empty: that of `tocsin up`.")
    prefix: str = Field("tocsin", min_length=1, description="Prefix of every key.")
    connect_timeout_s: float = Field(30.0, gt=0, description="How long to try to reach the store at start, seconds.")
    flush_interval_s: float = Field(1.0, gt=0, description="Time between two writes of changed series, seconds.")
    username: str = Field("", description="ACL user, if it is not in the URL.")
    password: SecretStr = Field(SecretStr(""), description="Password, if it is not in the URL.")
    ssl_cafile: str = Field(
        "", description="CA certificates, PEM, that the server's must come from; empty: the system's."
    )
    ssl_certfile: str = Field("", description="Certificate of this client, PEM, with its chain; empty: none.")
    ssl_keyfile: str = Field("", description="Its private key, PEM; empty: in the same file.")
    ssl_keypassword: SecretStr = Field(SecretStr(""), description="Password of the private key.")
    ssl_check_hostname: bool = Field(True, description="Whether the server's certificate must bear its host name.")

    @model_validator(mode="after")
    def _security_fits_together(self) -> Self:
        _refuse(redis_options, self)
        return self

    def without_security(self, url: str) -> Self:
        """Return the same for another store, one that lets everyone in."""
        secure = ("username", "password")
        kept = {name for name in type(self).model_fields if name not in secure and not name.startswith("ssl_")}
        return type(self)(**self.model_dump(include=kept) | {"url": SecretStr(url)})


class PotSettings(Section):
    """The threshold."""

    q: float = Field(PotConfig.q, gt=0, lt=1, description="Risk: share of normal points that may be flagged.")
    level: float = Field(PotConfig.level, gt=0, lt=1, description="Quantile of the scores above which the tail begins.")
    min_scores: int = Field(
        PotConfig.min_scores, ge=1, description="Scores after which a new series has a threshold of its own."
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        try:
            self.config()
        except ConfigError as e:
            raise ValueError(str(e)) from None
        return self

    def config(self) -> PotConfig:
        """Return the part that the core needs."""
        return PotConfig(q=self.q, level=self.level, min_scores=self.min_scores)


class Settings(BaseSettings):
    """All settings of a service."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", allow_inf_nan=False
    )

    kafka: KafkaSettings = KafkaSettings()
    redis: RedisSettings = RedisSettings()
    pot: PotSettings = PotSettings()
    checkpoint: str = Field("deepant", description="Checkpoint that scores, NAME, NAME@VERSION or NAME@LABEL.")
    checkpoints: Path = Field(
        Path("checkpoints"), description="Model repository; the bundled one is searched after it."
    )
    interval_s: float = Field(0.0, ge=0, description="Grid step of every KPI, seconds; 0: inferred for each.")
    rules: str = Field("", description="Rules file, YAML; empty: these settings are the one rule for all KPIs.")
    rules_poll_s: float = Field(2.0, gt=0, description="How often the rules file is looked at for changes, seconds.")
    models_poll_s: float = Field(5.0, gt=0, description="How often the model repository is looked at, seconds.")
    lateness_s: float = Field(
        0.0, ge=0, description="How late a point may come and still correct what was said, seconds."
    )
    silent_after: int = Field(
        SILENT_AFTER, ge=0, description="Intervals without a point after which a KPI is silent; 0: never."
    )
    warmup_h: float = Field(24.0, ge=0, description="Event time after which it may, hours; until then a prior.")
    min_observed: float = Field(0.2, ge=0, le=1, description="Share of a window that must have arrived to be scored.")
    follow_ratio: float = Field(
        2.0,
        ge=1,
        description="A flagged value beyond this many thresholds is not learned at all; a nearer one in part.",
    )
    recover_after: int = Field(3, ge=1, description="Normal points in a row that resolve an incident.")
    accept_after_h: float = Field(12.0, gt=0, description="An incident this long is taken for the new normal, hours.")
    future_limit_s: float = Field(600.0, gt=0, description="How far ahead of its arrival a point may lie, seconds.")
    series_max: int = Field(
        DetectorConfig().series_max,
        ge=1,
        description="Series of a partition; beyond it a new one takes the place of an idle one.",
    )
    series_idle_h: float = Field(
        168.0,
        gt=0,
        description="A series may lose its place once it has sent nothing for so long, hours of event time.",
    )
    shutdown_timeout_s: float = Field(
        20.0, gt=0, description="How long a stop may take to settle and to write the state, seconds."
    )
    source: str = Field("tocsin", pattern=r"^[!-~]+$", description="CloudEvents source of the events, a URI reference.")
    log_level: str = Field(
        "INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Logs on stderr from this level."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what is given: `load_settings` says which environment it comes from."""
        return (init_settings,)

    def detector(self) -> DetectorConfig:
        """Return what is the same for all series."""
        return DetectorConfig(
            pot=self.pot.config(),
            min_observed=self.min_observed,
            follow_ratio=self.follow_ratio,
            source=self.source,
            series_max=self.series_max,
            idle_ms=round(self.series_idle_h * HOUR_MS),
        )

    def roots(self) -> list[Path]:
        """Return where checkpoints are looked for: the user's repository, then the bundled one."""
        return [self.checkpoints, bundled_root()]

    def policy(self) -> Policy:
        """Return what a rule asks for where it says nothing else."""
        return Policy(
            interval_ms=round(self.interval_s * 1000),
            q=self.pot.q,
            lateness_ms=round(self.lateness_s * 1000),
            silent_after=self.silent_after,
            warmup_ms=round(self.warmup_h * HOUR_MS),
            recover_after=self.recover_after,
            accept_after_ms=round(self.accept_after_h * HOUR_MS),
        )


def known_names(model: type[BaseModel] = Settings, prefix: str = PREFIX) -> Iterator[tuple[str, str, object]]:
    """Yield (environment variable, description, default) of every setting; a secret one shows as stars."""
    for name, info in model.model_fields.items():
        variable = f"{prefix}{name.upper()}"
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from known_names(info.annotation, f"{variable}__")
        else:
            yield variable, info.description or "", info.default


_SECRETS = frozenset(name for name, _, default in known_names() if isinstance(default, SecretStr))


class _Environment(EnvSettingsSource):
    """The environment variables of a mapping: pydantic-settings by itself reads those of this process only."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = {name.lower(): value for name, value in environ.items()}
        super().__init__(Settings)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._environ


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from the environment.

    A secret may stand in a file, as Kubernetes and Docker mount them: `TOCSIN_REDIS__PASSWORD_FILE` names it.

    Raises:
        ConfigError: a name that no setting has (with the nearest one that exists), a value out of its bounds, or a
            file that cannot be read.
    """
    environ = os.environ if environ is None else environ
    names = [name for name, _, _ in known_names()]
    for variable in sorted(environ):
        upper = variable.upper()
        if not upper.startswith(PREFIX) or upper.startswith(RESERVED):
            continue
        if upper not in names and upper.removesuffix(FILE) not in _SECRETS:
            near = difflib.get_close_matches(upper, names, n=1)
            hint = f"did you mean {near[0]}?" if near else "`tocsin check --settings` lists them"
            raise ConfigError(f"{variable}: there is no such setting; {hint}")
    try:
        return Settings(**_Environment(_with_files(environ))())
    except ValidationError as e:
        raise ConfigError(_explain(e)) from None


def _with_files(environ: Mapping[str, str]) -> dict[str, str]:
    """Put the contents of the files in the place of the variables that name them."""
    values = dict(environ)
    for variable, path in environ.items():
        name = variable.upper().removesuffix(FILE)
        if name not in _SECRETS or name == variable.upper():
            continue
        del values[variable]
        if any(other.upper() == name and value for other, value in environ.items()):
            raise ConfigError(f"{variable} is set, and {name} too: leave one of them out")
        try:
            values[name] = read_secret(path)
        except (OSError, ValueError) as e:
            raise ConfigError(f"{variable}={path}: {e.strerror if isinstance(e, OSError) else e}") from None
    return values


def _explain(error: ValidationError) -> str:
    problems = []
    for item in error.errors():
        name = PREFIX + "__".join(str(part).upper() for part in item["loc"])
        secret = name in _SECRETS or isinstance(item["input"], dict)  # of a section, which may hold one
        value = "" if secret else f"={str(item['input'])[:60]!r}"
        message = item["msg"].removeprefix("Value error, ")
        problems.append(message if message.startswith(f"{name}__") else f"{name}{value}: {message}")
    return "; ".join(problems)
