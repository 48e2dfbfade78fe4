"""How the service shows Kafka and Redis who it is: its settings checked, certificates and secrets read.

Nothing secret is in what this module says.
"""

from __future__ import annotations

import functools
import logging
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from pydantic import SecretStr

from stream.errors import ConfigError

if TYPE_CHECKING:
    from stream.settings import KafkaSettings, RedisSettings

log = logging.getLogger(__name__)

KAFKA, REDIS = "TOCSIN_KAFKA__", "TOCSIN_REDIS__"
PASSWORDS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")  # mechanisms of a user with a password
_TOKEN_BYTES_MAX = 64 << 10
_URL_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")  # what a Redis URL may name


# -- TLS --------------------------------------------------------------------------------------------------------------


class Certificates(NamedTuple):
    """The files of one TLS client, and the prefix of the settings that name them."""

    prefix: str
    cafile: str
    certfile: str
    keyfile: str
    keypassword: SecretStr
    check_hostname: bool

    @classmethod
    def of(cls, prefix: str, settings: KafkaSettings | RedisSettings) -> Certificates:
        """Return those of a section of the settings."""
        return cls(
            prefix,
            settings.ssl_cafile,
            settings.ssl_certfile,
            settings.ssl_keyfile,
            settings.ssl_keypassword,
            settings.ssl_check_hostname,
        )


class _Context(ssl.SSLContext):
    """A client's TLS context that takes its files anew, before it connects, once they have changed.

    Certificates that a cluster makes live for hours or days, the service for months.
    """

    def watch(self, certificates: Certificates) -> None:
        self._certificates = certificates
        self._seen = _stamps(certificates)

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        stamps = _stamps(self._certificates)
        if stamps != self._seen:
            try:
                _load(self, self._certificates)
                self._seen = stamps
            except ConfigError as e:  # half written, perhaps; the next connection looks again
                log.warning("the certificates that were in force stay: %s", e)
        return super().wrap_bio(*arguments, **options)


@functools.lru_cache(maxsize=8)
def tls_context(certificates: Certificates) -> ssl.SSLContext:
    """Return a context that checks the server's certificate and shows that of the client, if there is one.

    Raises:
        ConfigError: a file is not there or not what it should be; the message names its setting.
    """
    context = _Context(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name; TLS 1.2 at least
    context.check_hostname = certificates.check_hostname
    if not certificates.cafile:
        context.load_default_certs()
    _load(context, certificates)
    context.watch(certificates)
    return context


def _load(context: ssl.SSLContext, files: Certificates) -> None:
    for name in ("cafile", "certfile", "keyfile"):
        check_readable(f"{files.prefix}SSL_{name.upper()}", getattr(files, name))
    if files.cafile:
        try:
            context.load_verify_locations(files.cafile)
        except ssl.SSLError as e:
            raise ConfigError(f"{files.prefix}SSL_CAFILE={files.cafile}: no certificates in PEM form there") from e
    if files.certfile:
        try:
            # A function: without one, OpenSSL would ask for the password of an encrypted key at the terminal.
            context.load_cert_chain(files.certfile, files.keyfile or None, lambda: files.keypassword.get_secret_value())
        except (ssl.SSLError, ValueError) as e:  # a ValueError: an empty password
            raise ConfigError(
                f"{files.prefix}SSL_CERTFILE={files.certfile}: no certificate and key in PEM form that belong together"
                f" (key: {files.keyfile or 'in the same file'}), or {files.prefix}SSL_KEYPASSWORD does not open the key"
            ) from e


def _stamps(files: Certificates) -> list[int]:
    stamps = []
    for path in (files.cafile, files.certfile, files.keyfile):
        try:
            stamps.append(Path(path).stat().st_mtime_ns if path else 0)
        except OSError:
            stamps.append(0)
    return stamps


def check_readable(setting: str, path: str) -> None:
    """Make sure that a file, if one is named, can be read.

    Raises:
        ConfigError: it cannot; the message names the setting.
    """
    if not path:
        return
    try:
        with Path(path).open("rb") as file:
            file.read(1)
    except OSError as e:
        raise ConfigError(f"{setting}={path}: {e.strerror or e}") from e


# -- Kafka ------------------------------------------------------------------------------------------------------------


def read_secret(path: str) -> str:
    """Return what a file holds, without the white space at its ends.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty, no text, or far too long to be a secret.
    """
    with Path(path).open("rb") as file:
        data = file.read(_TOKEN_BYTES_MAX + 1)
    if len(data) > _TOKEN_BYTES_MAX:
        raise ValueError(f"more than {_TOKEN_BYTES_MAX} bytes")
    try:
        secret = data.decode().strip()
    except UnicodeDecodeError:
        raise ValueError("no text in UTF-8") from None  # the cause would quote it
    if not secret:
        raise ValueError("empty")
    return secret


def check_kafka(settings: KafkaSettings) -> None:
    """Make sure that the settings of security fit together, and that their files are there.

    Raises:
        ConfigError: they do not; the message names the setting.
    """
    protocol, mechanism = settings.security_protocol, settings.sasl_mechanism
    login = {"SASL_USERNAME": settings.sasl_username, "SASL_PASSWORD": settings.sasl_password.get_secret_value()}
    token = {"SASL_TOKEN_FILE": settings.sasl_token_file}
    if not protocol.endswith("SSL"):
        _have_no_use(KAFKA, _tls(settings), f"{KAFKA}SECURITY_PROTOCOL={protocol}, which is without TLS")
    else:
        _check_key(KAFKA, settings)
        tls_context(Certificates.of(KAFKA, settings))
    if not protocol.startswith("SASL"):
        sasl = {"SASL_MECHANISM": mechanism} | login | token
        _have_no_use(KAFKA, sasl, f"{KAFKA}SECURITY_PROTOCOL={protocol}, which is without SASL")
        return
    if not mechanism:
        raise ConfigError(
            f"{KAFKA}SASL_MECHANISM is not set: with {KAFKA}SECURITY_PROTOCOL={protocol} it is one of"
            f" {', '.join(PASSWORDS)}, OAUTHBEARER"
        )
    needed, useless = (login, token) if mechanism in PASSWORDS else (token, login)
    _have_no_use(KAFKA, useless, f"{KAFKA}SASL_MECHANISM={mechanism}")
    for name, value in needed.items():
        if not value:
            raise ConfigError(f"{KAFKA}{name} is not set: {KAFKA}SASL_MECHANISM={mechanism} needs it")
    if settings.sasl_token_file:
        try:
            read_secret(settings.sasl_token_file)
        except (OSError, ValueError) as e:
            why = e.strerror if isinstance(e, OSError) else str(e)
            raise ConfigError(f"{KAFKA}SASL_TOKEN_FILE={settings.sasl_token_file}: {why}") from None


def _tls(settings: KafkaSettings | RedisSettings) -> dict[str, str]:
    return {
        "SSL_CAFILE": settings.ssl_cafile,
        "SSL_CERTFILE": settings.ssl_certfile,
        "SSL_KEYFILE": settings.ssl_keyfile,
        "SSL_KEYPASSWORD": settings.ssl_keypassword.get_secret_value(),
        "SSL_CHECK_HOSTNAME": "" if settings.ssl_check_hostname else "false",
    }


def _check_key(prefix: str, settings: KafkaSettings | RedisSettings) -> None:
    for name in ("SSL_KEYFILE", "SSL_KEYPASSWORD"):
        if _tls(settings)[name] and not settings.ssl_certfile:
            raise ConfigError(f"{prefix}{name} is set, but not the certificate of the key: {prefix}SSL_CERTFILE")


def _have_no_use(prefix: str, values: dict[str, str], because: str) -> None:
    """Refuse what would be set in vain: whoever sets it believes in a protection that is not there."""
    for name, value in values.items():
        if value:
            raise ConfigError(f"{prefix}{name} is set, but has no use with {because}")


# -- Redis ------------------------------------------------------------------------------------------------------------


def redis_options(settings: RedisSettings) -> dict[str, Any]:
    """Return what redis-py's clients need, beside the URL, to be let in.

    Raises:
        ConfigError: settings that contradict each other, or a file that is not there; the message names the setting.
    """
    url = settings.url.get_secret_value()
    login = {"USERNAME": settings.username, "PASSWORD": settings.password.get_secret_value()}
    _check_redis(settings, url, login)
    options: dict[str, Any] = {name.lower(): value for name, value in login.items() if value}
    if url.startswith("rediss:"):
        given = {
            "ssl_ca_certs": settings.ssl_cafile,
            "ssl_certfile": settings.ssl_certfile,
            "ssl_keyfile": settings.ssl_keyfile,
            "ssl_password": settings.ssl_keypassword.get_secret_value(),
        }
        options |= {name: value for name, value in given.items() if value}
        options["ssl_check_hostname"] = settings.ssl_check_hostname
    return options


def _check_redis(settings: RedisSettings, url: str, login: dict[str, str]) -> None:
    if not url:
        _have_no_use(REDIS, login | _tls(settings), f"an empty {REDIS}URL")
        return
    try:
        parts = urlsplit(url)
        in_url = {"USERNAME": parts.username, "PASSWORD": parts.password}
        query = parse_qs(parts.query)
    except ValueError:  # the store says what is wrong with it
        return
    for name, value in login.items():
        if value and in_url[name]:
            raise ConfigError(f"{REDIS}{name} is set, and {REDIS}URL has one too: leave one of them out")
    if settings.username and not (login["PASSWORD"] or in_url["PASSWORD"]):
        raise ConfigError(f"{REDIS}PASSWORD is not set: {REDIS}USERNAME={settings.username} needs it")
    if parts.scheme != "rediss":
        _have_no_use(REDIS, _tls(settings), f"a {REDIS}URL that does not begin with rediss://")
        return
    for name in _URL_FILES:
        for path in query.get(name, []):
            check_readable(f"{REDIS}URL: {name}", path)
    _check_key(REDIS, settings)
    tls_context(Certificates.of(REDIS, settings))  # redis-py makes its own of the same files, but names no setting
