"""Settings of security, files of secrets, what is logged; and that nothing that is read can be executed."""

from __future__ import annotations

import ast
import asyncio
import logging
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka.abc import AbstractTokenProvider
from aiokafka.protocol.admin import SaslAuthenticateRequest
from pydantic import SecretStr

from stream.discovery import with_servers
from stream.embedded import LOOPBACK, Servers
from stream.errors import ConfigError
from stream.kafka import TokenFile, client_options
from stream.security import KAFKA, Certificates, read_secret, redis_options, tls_context
from stream.settings import KafkaSettings, RedisSettings, load_settings
from tests.certificates import Authority

ROOT = Path(__file__).parents[2]
SECRET = "s3cret-and-more"
TLS = {"SECURITY_PROTOCOL": "SSL"}
PLAIN = {"SECURITY_PROTOCOL": "SASL_SSL", "SASL_MECHANISM": "PLAIN"}
LOGIN = {"SASL_USERNAME": "u", "SASL_PASSWORD": SECRET}
TOKEN = {"SECURITY_PROTOCOL": "SASL_SSL", "SASL_MECHANISM": "OAUTHBEARER"}


@pytest.mark.parametrize(
    ("kafka", "message"),
    [
        ({"SECURITY_PROTOCOL": "TLS"}, "TOCSIN_KAFKA__SECURITY_PROTOCOL='TLS': Input should be 'PLAINTEXT', 'SSL'"),
        (PLAIN | {"SASL_MECHANISM": "GSSAPI"}, "TOCSIN_KAFKA__SASL_MECHANISM='GSSAPI': Input should be"),
        ({"SECURITY_PROTOCOL": "SASL_SSL"}, "TOCSIN_KAFKA__SASL_MECHANISM is not set"),
        (PLAIN, "TOCSIN_KAFKA__SASL_USERNAME is not set: TOCSIN_KAFKA__SASL_MECHANISM=PLAIN needs it"),
        (PLAIN | {"SASL_USERNAME": "u"}, "TOCSIN_KAFKA__SASL_PASSWORD is not set"),
        (TOKEN, "TOCSIN_KAFKA__SASL_TOKEN_FILE is not set"),
        (TOKEN | {"SASL_TOKEN_FILE": "no/such"}, "TOCSIN_KAFKA__SASL_TOKEN_FILE=no/such: No such file or directory"),
        (TOKEN | LOGIN, "TOCSIN_KAFKA__SASL_USERNAME is set, but has no use with TOCSIN_KAFKA__SASL_MECHANISM=OAUTH"),
        (PLAIN | LOGIN | {"SASL_TOKEN_FILE": "x"}, "TOCSIN_KAFKA__SASL_TOKEN_FILE is set, but has no use with"),
        (LOGIN, "TOCSIN_KAFKA__SASL_USERNAME is set, but has no use with TOCSIN_KAFKA__SECURITY_PROTOCOL=PLAINTEXT"),
        (TLS | LOGIN, "TOCSIN_KAFKA__SASL_USERNAME is set, but has no use with TOCSIN_KAFKA__SECURITY_PROTOCOL=SSL"),
        ({"SSL_CAFILE": "x"}, "TOCSIN_KAFKA__SSL_CAFILE is set, but has no use with TOCSIN_KAFKA__SECURITY_PROTOCOL="),
        ({"SSL_CHECK_HOSTNAME": "false"}, "TOCSIN_KAFKA__SSL_CHECK_HOSTNAME is set, but has no use with"),
        (TLS | {"SSL_CAFILE": "no/such"}, "TOCSIN_KAFKA__SSL_CAFILE=no/such: No such file or directory"),
        (TLS | {"SSL_CAFILE": str(ROOT)}, f"TOCSIN_KAFKA__SSL_CAFILE={ROOT}: Is a directory"),
        (TLS | {"SSL_CAFILE": __file__}, f"TOCSIN_KAFKA__SSL_CAFILE={__file__}: no certificates in PEM form there"),
        (TLS | {"SSL_CERTFILE": __file__}, f"TOCSIN_KAFKA__SSL_CERTFILE={__file__}: no certificate and key in PEM"),
        (TLS | {"SSL_KEYFILE": "x"}, "TOCSIN_KAFKA__SSL_KEYFILE is set, but not the certificate of the key"),
        (TLS | {"SSL_KEYPASSWORD": SECRET}, "TOCSIN_KAFKA__SSL_KEYPASSWORD is set, but not the certificate"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)  # fmt: skip
def test_settings_of_kafka_that_do_not_fit_together(kafka: dict[str, str], message: str) -> None:
    check_refused({f"TOCSIN_KAFKA__{name}": value for name, value in kafka.items()}, message)


@pytest.mark.parametrize(
    ("redis", "message"),
    [
        ({"URL": f"redis://:{SECRET}@h", "PASSWORD": SECRET}, "TOCSIN_REDIS__PASSWORD is set, and TOCSIN_REDIS__U"),
        ({"URL": f"redis://u:{SECRET}@h", "USERNAME": "u"}, "TOCSIN_REDIS__USERNAME is set, and TOCSIN_REDIS__URL has"),
        ({"URL": "redis://h", "USERNAME": "u"}, "TOCSIN_REDIS__PASSWORD is not set: TOCSIN_REDIS__USERNAME=u needs it"),
        ({"PASSWORD": SECRET}, "TOCSIN_REDIS__PASSWORD is set, but has no use with an empty TOCSIN_REDIS__URL"),
        ({"URL": "redis://h", "SSL_CAFILE": "x"}, "TOCSIN_REDIS__SSL_CAFILE is set, but has no use with a"),
        ({"URL": "rediss://h", "SSL_CAFILE": "no/such"}, "TOCSIN_REDIS__SSL_CAFILE=no/such: No such file"),
        ({"URL": "rediss://h", "SSL_KEYFILE": "x"}, "TOCSIN_REDIS__SSL_KEYFILE is set, but not the certificate"),
        ({"URL": "rediss://h?ssl_ca_certs=no/such"}, "TOCSIN_REDIS__URL: ssl_ca_certs=no/such: No such file"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)  # fmt: skip
def test_settings_of_redis_that_do_not_fit_together(redis: dict[str, str], message: str) -> None:
    check_refused({f"TOCSIN_REDIS__{name}": value for name, value in redis.items()}, message)


def check_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(environment)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == 2
    assert SECRET not in str(caught.value)


def test_a_wrong_key_password_is_said_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    pem = Authority.new(tmp_path).client("tocsin", password=SECRET)
    for password in ("", "another"):
        environment = {"TOCSIN_KAFKA__SECURITY_PROTOCOL": "SSL", "TOCSIN_KAFKA__SSL_CERTFILE": pem}
        if password:
            environment["TOCSIN_KAFKA__SSL_KEYPASSWORD"] = password
        with pytest.raises(ConfigError, match="or TOCSIN_KAFKA__SSL_KEYPASSWORD does not open the key"):
            load_settings(environment)
    load_settings(environment | {"TOCSIN_KAFKA__SSL_KEYPASSWORD": SECRET})


# -- secrets in files -------------------------------------------------------------------------------------------------


def test_a_secret_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(f"redis://:{SECRET}@host:6379/0\n")
    settings = load_settings({"TOCSIN_REDIS__URL_FILE": str(file)})
    assert settings.redis.url.get_secret_value() == f"redis://:{SECRET}@host:6379/0"
    assert SECRET not in repr(settings)


def test_files_are_for_secrets_only() -> None:
    with pytest.raises(ConfigError, match="there is no such setting"):
        load_settings({"TOCSIN_KAFKA__GROUP_FILE": "/etc/hostname"})


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), (b"", "empty"), (b" \n", "empty"), (b"\xff\xfe", "no text"), (b"x" * 70_000, "more than")],
)
def test_a_file_that_holds_no_secret_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^TOCSIN_REDIS__URL_FILE={file}: {said}"):
        load_settings({"TOCSIN_REDIS__URL_FILE": str(file)})


def test_a_secret_is_given_once(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET)
    with pytest.raises(ConfigError, match=r"^TOCSIN_REDIS__URL_FILE is set, and TOCSIN_REDIS__URL too"):
        load_settings({"TOCSIN_REDIS__URL_FILE": str(file), "tocsin_redis__url": SECRET})
    assert read_secret(str(file)) == SECRET


async def test_a_token_is_read_again_for_each_connection(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    settings = KafkaSettings.model_validate(
        {"security_protocol": "SASL_PLAINTEXT", "sasl_mechanism": "OAUTHBEARER", "sasl_token_file": str(file)}
    )
    provider = client_options(settings)["sasl_oauth_token_provider"]
    assert isinstance(provider, TokenFile) and isinstance(provider, AbstractTokenProvider)
    assert await provider.token() == "first"
    file.write_text("second")
    assert await provider.token() == "second"
    for content in (b"", b"\xff"):
        file.write_bytes(content)
        with pytest.raises(OSError, match="token"):  # what aiokafka takes for a connection that failed
            await provider.token()


# -- TLS --------------------------------------------------------------------------------------------------------------


def certificates(cafile: str, certfile: str = "", *, check_hostname: bool = True) -> Certificates:
    return Certificates(KAFKA, cafile, certfile, "", SecretStr(""), check_hostname)


def test_a_context_trusts_nobody_by_default(tmp_path: Path) -> None:
    cafile = Authority.new(tmp_path).cafile
    context = tls_context(certificates(cafile))
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert tls_context(certificates(cafile)) is context, "one for all clients"
    context = tls_context(certificates(cafile, check_hostname=False))
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, False)


async def test_certificates_that_change_on_disk_are_taken_by_the_next_connection(tmp_path: Path) -> None:
    old, new = Authority.new(tmp_path / "old"), Authority.new(tmp_path / "new")
    cafile = tmp_path / "ca.pem"
    shutil.copy(old.cafile, cafile)
    context = tls_context(certificates(str(cafile)))

    async def is_trusted(authority: Authority) -> bool:
        theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        theirs.load_cert_chain(authority.server())

        async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with await asyncio.start_server(hello, LOOPBACK, 0, ssl=theirs) as server:
            port = server.sockets[0].getsockname()[1]
            try:
                _, writer = await asyncio.open_connection(LOOPBACK, port, ssl=context)
            except ssl.SSLCertVerificationError:
                return False
            writer.close()
            return True

    assert await is_trusted(old) and not await is_trusted(new)
    cafile.write_bytes(b"half written")
    assert await is_trusted(old), "what was in force stays"
    shutil.copy(new.cafile, cafile)
    assert await is_trusted(new)


def test_options_of_redis_hold_what_the_url_does_not_say(tmp_path: Path) -> None:
    authority = Authority.new(tmp_path)
    pem = authority.client("tocsin", password=SECRET)
    settings = RedisSettings.model_validate(
        {"url": "rediss://h", "ssl_cafile": authority.cafile, "ssl_certfile": pem, "ssl_keypassword": SECRET}
    )
    assert redis_options(settings) == {
        "ssl_ca_certs": authority.cafile,
        "ssl_certfile": pem,
        "ssl_password": SECRET,
        "ssl_check_hostname": True,
    }
    assert redis_options(RedisSettings.model_validate({"url": "redis://h"})) == {}


def test_embedded_servers_let_everyone_in(tmp_path: Path) -> None:
    """So what was set for others is left out: `tocsin demo` works in the service's own environment."""
    environment = {f"TOCSIN_KAFKA__{name}": value for name, value in (PLAIN | LOGIN).items()}
    environment |= {"TOCSIN_REDIS__URL": "rediss://h", "TOCSIN_REDIS__PASSWORD": SECRET, "TOCSIN_KAFKA__GROUP": "g"}
    settings = with_servers(load_settings(environment), Servers("127.0.0.1:1", "redis://127.0.0.1:2/0", tmp_path))
    assert settings.kafka == KafkaSettings(bootstrap_servers="127.0.0.1:1", group="g")
    assert redis_options(settings.redis) == {}


def test_what_is_logged_holds_no_login(caplog: pytest.LogCaptureFixture) -> None:
    """At DEBUG aiokafka logs each request as it is."""
    client_options(KafkaSettings.model_validate({name.lower(): value for name, value in (PLAIN | LOGIN).items()}))
    caplog.set_level(logging.DEBUG)
    log = logging.getLogger("aiokafka.conn")
    request: Any = SaslAuthenticateRequest(f"\0u\0{SECRET}".encode()).prepare({36: (0, 1)})
    log.debug("Request to %s:%d %d: %s", "h", 1, 2, request)
    log.debug("Request to %s:%d %d: %s", "h", 1, 2, "another")
    assert [record.args[-1] for record in caplog.records if isinstance(record.args, tuple)] == ["another"]


# -- nobody forgets ---------------------------------------------------------------------------------------------------

CLIENTS = {"AIOKafkaConsumer", "AIOKafkaProducer", "AIOKafkaAdminClient"}
PLAIN_ONLY = {"embedded.py"}  # speaks to a broker of its own, on loopback


def test_every_client_of_kafka_gets_the_options_of_security() -> None:
    made = 0
    for path, call in calls("stream"):
        name = called(call)
        if name in CLIENTS and path.name not in PLAIN_ONLY:
            unpacked = " ".join(ast.unparse(one.value) for one in call.keywords if one.arg is None)
            assert "client_options(" in unpacked or "options" in unpacked, f"{path.name}:{call.lineno}"
            made += 1
        if name in {"ensure_topics", "why_unreachable"}:
            assert "bootstrap_servers" not in ast.unparse(call.args[0]), f"{path.name}:{call.lineno}: give the settings"
        if name == "Store":
            assert "redis" not in ast.unparse(call), f"{path.name}:{call.lineno}: Store.of(settings.redis)"
    assert made >= 5


# -- nothing that is read is executed ---------------------------------------------------------------------------------

# What makes code, or objects of any class, of bytes. `torch.load` with weights_only and `numpy.load` without
# allow_pickle make arrays only; the name of pickle's error may be had.
FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "code"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "pd.read_pickle", "pandas.read_pickle"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all"),
}


def calls(*packages: str) -> Iterator[tuple[Path, ast.Call]]:
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(), str(path))):
                if isinstance(node, ast.Call):
                    yield path, node


def called(call: ast.Call) -> str:
    return ast.unparse(call.func) if isinstance(call.func, ast.Name | ast.Attribute) else ""


def problems(source: str) -> list[str]:
    """Return what in a source could make code of data."""
    found, tree = [], ast.parse(source)
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"]
    harmless = {"pickle"} if uses and all(node.attr == "UnpicklingError" for node in uses) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES - harmless]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in FORBIDDEN_CALLS]
        elif isinstance(node, ast.Call):
            name, words = called(node), {one.arg: ast.unparse(one.value) for one in node.keywords}
            forbidden = name in FORBIDDEN_CALLS and not (name == "torch.load" and words.get("weights_only") == "True")
            if forbidden or words.get("allow_pickle", "False") != "False" or words.get("shell") == "True":
                found.append(name)
            loader = words.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "")
            if name in {"yaml.load", "yaml.load_all"} and loader.split(".")[-1] not in SAFE_LOADERS:
                found.append(f"{name} with {loader or 'no loader'}")
    return found


def safe_loaders() -> set[str]:
    """Return SafeLoader, and the classes of ours that are made of it."""
    names = {"SafeLoader", "CSafeLoader"}
    for package in ("stream", "models"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and any(ast.unparse(b).split(".")[-1] in names for b in node.bases):
                    names.add(node.name)
    return names


SAFE_LOADERS = safe_loaders()


@pytest.mark.parametrize("package", ["stream", "models"])
def test_nothing_that_is_read_can_execute_code(package: str) -> None:
    paths = sorted((ROOT / package).rglob("*.py"))
    assert len(paths) > 10
    found = {path.relative_to(ROOT).as_posix(): problems(path.read_text()) for path in paths}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import shelve",
        "import pickle\npickle.loads(b'') or pickle.UnpicklingError",
        "torch.load('x')",
        "torch.load('x', weights_only=some)",
        "from torch import load",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text, yaml.FullLoader)",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "np.savez(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_walk_finds_what_it_looks_for(source: str) -> None:
    assert problems(source)
    assert not problems("import yaml\nyaml.safe_load(text)\nyaml.load(text, Loader=yaml.SafeLoader)\nre.compile(text)")
    assert not problems("import pickle\ntorch.load(x, weights_only=True)\nnp.load(x)\npickle.UnpicklingError")
