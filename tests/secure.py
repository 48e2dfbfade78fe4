"""A real Kafka with TLS, SASL and ACLs, a store with TLS and ACLs, and the rights that deploy/acl gives."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import hashlib
import json
import os
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jwt
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)
from cryptography.hazmat.primitives.asymmetric import rsa
from redis.asyncio import Redis
from redis.exceptions import RedisError

from stream.embedded import LOOPBACK, free_port
from tests.certificates import Authority
from tests.servers import KafkaServer, StoreServer

ADMIN, ADMIN_PASSWORD = "admin", "admin-s3cret"
ACL_DIR = Path(__file__).parents[1] / "deploy" / "acl"
_KEY_ID = "tocsin-test"


class SecureKafka(KafkaServer):
    """A Kafka that lets nobody in without a name, and does only what ACLs allow; its clients speak at three ports.

    Attributes:
        authority: of its certificates.
        sasl_ssl: host:port, for SASL over TLS.
        sasl_plain: host:port, for SASL in the clear.
        mtls: host:port, for client certificates.
    """

    def __init__(self, users: dict[str, str]) -> None:
        """Make one.

        Args:
            users: password of each user, for PLAIN and SCRAM.
        """
        super().__init__()
        self.authority = Authority.new(self.dir / "tls")
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        jwks = self.authority.dir / "jwks.json"
        jwk = jwt.algorithms.RSAAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        jwks.write_text(json.dumps({"keys": [jwk | {"kid": _KEY_ID, "use": "sig", "alg": "RS256"}]}))
        scram = [f"[name={user},password={password}]" for user, password in users.items()]
        allowed = "-Dorg.apache.kafka.sasl.oauthbearer.allowed"
        for kind in ("256", "512"):
            self.format_options += [part for one in scram for part in ("--add-scram", f"SCRAM-SHA-{kind}={one}")]
        self.jvm_options += [f"{allowed}.urls={jwks.as_uri()}", f"{allowed}.files={jwks}"]
        plain_port, mtls_port = free_port(), free_port()
        self.sasl_ssl, self.sasl_plain, self.mtls = (f"{LOOPBACK}:{p}" for p in (self.port, plain_port, mtls_port))
        logins = " ".join(f'user_{user}="{password}"' for user, password in ({ADMIN: ADMIN_PASSWORD} | users).items())
        plain = f'{_MODULES}.plain.PlainLoginModule required username="{ADMIN}" password="{ADMIN_PASSWORD}" {logins};'
        tokens = {
            "jaas.config": f"{_OAUTH}.OAuthBearerLoginModule required;",
            "server.callback.handler.class": f"{_OAUTH}.OAuthBearerValidatorCallbackHandler",
            "oauthbearer.jwks.endpoint.url": jwks.as_uri(),
            "oauthbearer.expected.audience": "kafka",
            "oauthbearer.clock.skew.seconds": "0",
        }
        self.config |= {
            "listeners": f"SASL_SSL://{self.sasl_ssl},SASL_PLAINTEXT://{self.sasl_plain},SSL://{self.mtls},"
            f"CONTROLLER://{LOOPBACK}:{self.controller_port}",
            "listener.security.protocol.map": "SASL_SSL:SASL_SSL,SASL_PLAINTEXT:SASL_PLAINTEXT,SSL:SSL,"
            "CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "SASL_PLAINTEXT",
            "sasl.mechanism.inter.broker.protocol": "PLAIN",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": self.authority.server(),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": self.authority.cafile,
            "listener.name.ssl.ssl.client.auth": "required",
            "ssl.principal.mapping.rules": "RULE:^.*CN=([^,]+).*$/$1/,DEFAULT",
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
            "listener.name.sasl_plaintext.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
            "listener.name.sasl_plaintext.plain.sasl.jaas.config": plain,
            "listener.name.sasl_plaintext.scram-sha-512.sasl.jaas.config": _SCRAM,
            "listener.name.sasl_ssl.plain.sasl.jaas.config": plain,
            "listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config": _SCRAM,
            "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": _SCRAM,
            **{f"listener.name.sasl_ssl.oauthbearer.sasl.{name}": value for name, value in tokens.items()},
            # The controller's own link on loopback has no name.
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": f"User:{ADMIN};User:ANONYMOUS",
            "allow.everyone.if.no.acl.found": "false",
        }

    def token(self, user: str, lifetime_s: float = 3600.0, *, key: rsa.RSAPrivateKey | None = None) -> str:
        """Return a signed token for a user; with another key, one that the broker does not accept."""
        now = time.time()
        claims = {"sub": user, "aud": "kafka", "iat": int(now), "exp": int(now + lifetime_s)}
        return jwt.encode(claims, key or self._key, algorithm="RS256", headers={"kid": _KEY_ID})

    @functools.cached_property
    def admin(self) -> AdminClient:
        """A client of the user who may do everything."""
        return AdminClient(
            {
                "bootstrap.servers": self.sasl_plain,
                "security.protocol": "SASL_PLAINTEXT",
                "sasl.mechanism": "PLAIN",
                "sasl.username": ADMIN,
                "sasl.password": ADMIN_PASSWORD,
            }
        )

    def create(self, *topics: str, partitions: int) -> None:
        """Make topics."""
        for made in self.admin.create_topics([NewTopic(topic, partitions, 1) for topic in topics]).values():
            made.result(20)

    def allow(self, bindings: Sequence[AclBinding]) -> None:
        """Give rights; they hold when this returns."""
        for made in self.admin.create_acls([*bindings]).values():
            made.result(20)
        self._until(lambda there: there.issuperset(map(str, bindings)))

    def forbid(self, binding: AclBinding) -> None:
        """Take a right away; it is gone when this returns."""
        one = AclBindingFilter(
            binding.restype,
            binding.name,
            binding.resource_pattern_type,
            binding.principal,
            binding.host,
            binding.operation,
            binding.permission_type,
        )
        for gone in self.admin.delete_acls([one]).values():
            assert gone.result(20), f"there was no {binding}"
        self._until(lambda there: str(binding) not in there)

    def _until(self, condition: Callable[[set[str]], bool]) -> None:
        every: Any = None
        everything = AclBindingFilter(
            ResourceType.ANY,
            every,
            ResourcePatternType.ANY,
            every,
            every,
            AclOperation.ANY,
            AclPermissionType.ANY,
        )
        deadline = time.monotonic() + 20
        while not condition(set(map(str, self.admin.describe_acls(everything).result(20)))):
            assert time.monotonic() < deadline, "rights are not as they were set"


_MODULES = "org.apache.kafka.common.security"
_OAUTH = f"{_MODULES}.oauthbearer"
_SCRAM = f"{_MODULES}.scram.ScramLoginModule required;"


def rights(**names: str) -> list[AclBinding]:
    """Return what deploy/acl/kafka-acls gives with these variables.

    It is run as it is, with Kafka's tool replaced by one that writes down what it is asked for: a JVM for each call
    would take seconds.
    """
    with tempfile.TemporaryDirectory() as directory:
        tool, asked = Path(directory, "acls"), Path(directory, "asked")
        tool.write_text(f"#!/usr/bin/env bash\nprintf '%s\\n' \"$@\" '' >> '{asked}'\n")
        tool.chmod(0o700)
        environment = {"PATH": os.environ["PATH"], "BOOTSTRAP": "kafka:9092", "KAFKA_ACLS": str(tool)} | names
        subprocess.run([str(ACL_DIR / "kafka-acls")], env=environment, check=True)
        calls = [call.split("\n") for call in asked.read_text().removesuffix("\n\n").split("\n\n")]
    return [binding for call in calls for binding in _bindings(call)]


def _bindings(call: Sequence[str]) -> Iterator[AclBinding]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    for flag in ("--add", "--force"):
        parser.add_argument(flag, action="store_true", required=True)
    for name in ("--bootstrap-server", "--allow-principal", "--operation"):
        parser.add_argument(name, required=True)
    for name in ("--topic", "--group", "--transactional-id"):
        parser.add_argument(name, action="append", default=[])
    parser.add_argument("--resource-pattern-type", default="literal")
    one = parser.parse_args(call)
    for kind, found in (("TOPIC", one.topic), ("GROUP", one.group), ("TRANSACTIONAL_ID", one.transactional_id)):
        for name in found:
            yield AclBinding(
                ResourceType[kind],
                name,
                ResourcePatternType[one.resource_pattern_type.upper()],
                one.allow_principal,
                "*",
                AclOperation[one.operation.upper()],
                AclPermissionType.ALLOW,
            )


class SecureStore(StoreServer):
    """A store that lets nobody in without a password, with the ACLs of deploy/acl, behind TLS.

    The embedded Valkey is built without TLS: this process ends it.

    Attributes:
        authority: of its certificates.
        tls_port: where clients speak to it.
        logins: connections that came to that port, so far.
    """

    def __init__(self, password: str, prefix: str = "tocsin") -> None:
        super().__init__()
        self.tls_port, self.logins = free_port(), 0
        self.authority = Authority.new(self.dir / "tls")
        acl = (ACL_DIR / "users.acl").read_text()
        acl = acl.replace("PASSWORD_SHA256", hashlib.sha256(password.encode()).hexdigest())
        acl = acl.replace("~tocsin:", f"~{prefix}:")
        acl = acl.replace("user default off", f"user default on >{ADMIN_PASSWORD} ~* &* +@all")
        (self.dir / "users.acl").write_text(acl)
        self._front: asyncio.Server | None = None
        self._links: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"rediss://{LOOPBACK}:{self.tls_port}/0"

    def command(self) -> list[str]:
        return [*super().command(), "--aclfile", str(self.dir / "users.acl")]

    def admin(self) -> Redis:
        """Return a client who may do everything."""
        return Redis.from_url(f"redis://:{ADMIN_PASSWORD}@{LOOPBACK}:{self.port}/0")

    async def ready(self) -> bool:
        async with self.admin() as redis:
            with contextlib.suppress(RedisError):
                return bool(await redis.ping())
        return False

    async def start(self) -> None:
        await super().start()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.authority.server())
        self._front = await asyncio.start_server(self._carry, LOOPBACK, self.tls_port, ssl=context)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.logins += 1
        back, forth = await asyncio.open_connection(LOOPBACK, self.port)

        async def one_way(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(64 << 10):
                    sink.write(data)
                    await sink.drain()
            sink.close()

        self._links |= {writer, forth}
        await asyncio.gather(one_way(reader, forth), one_way(back, writer))
        self._links -= {writer, forth}

    def close(self) -> None:
        if self._front is not None:
            self._front.close()
        for link in self._links:
            link.transport.abort()
        super().close()
