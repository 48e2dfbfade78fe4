"""The service where nothing is open: TLS, SASL and ACLs, with the rights that deploy/acl gives and no others."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import AclBinding  # type: ignore[attr-defined]
from cryptography.hazmat.primitives.asymmetric import rsa
from redis.asyncio import Redis

from stream.embedded import LOOPBACK
from stream.errors import BrokerError, StoreError
from stream.kafka import points_producer
from stream.pointslog import read_log
from stream.rejects import Wanted, retry
from stream.replay import replay
from stream.service import check_servers, make_worker
from stream.settings import RedisSettings, Settings, load_settings
from stream.store import Store
from stream.subscribe import subscribe
from stream.topics import ensure_topics
from tests.certificates import Authority
from tests.conftest import _running
from tests.faults.proxy import Proxy
from tests.live import (
    START_MS,
    backtested,
    digest,
    environment_for,
    published,
    read_all,
    sample_points,
    send,
    until,
    until_committed,
    working,
)
from tests.secure import ACL_DIR, SecureKafka, SecureStore, rights
from tests.servers import why_no_kafka

pytestmark = pytest.mark.kafka

PASSWORDS = {
    "tocsin": "t0csin-s3cret",
    "collector": "c0llector-s3cret",
    "oncall": "0ncall-s3cret",
    "operator": "0perator-s3cret",
}
REDIS_PASSWORD = "r3dis-s3cret"
WRONG = "wr0ng-s3cret"


@pytest.fixture(autouse=True)
async def _nothing_left_open() -> AsyncIterator[None]:
    """Let TLS connections that have been closed come to their end: aiokafka and redis-py do not wait for the answer."""
    yield
    selector = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while len(selector.get_map()) > 1 and time.monotonic() < deadline:  # more than the loop's own
        await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def secure() -> Iterator[SecureKafka]:
    if reason := why_no_kafka():
        pytest.skip(reason)
    yield from _running(SecureKafka(PASSWORDS))


@dataclass
class Place:
    """Names of one test's own, at the secure broker."""

    kafka: SecureKafka
    redis_url: str
    unique: str

    def environment(self, user: str = "tocsin", mechanism: str = "SCRAM-SHA-512", **more: str) -> dict[str, str]:
        """Return the settings of a user, over TLS and with a password."""
        names = {
            "SECURITY_PROTOCOL": "SASL_SSL",
            "SSL_CAFILE": self.kafka.authority.cafile,
            "SASL_MECHANISM": mechanism,
            "SHADOW_TOPIC": f"shadow.{self.unique}",
            "CONNECT_TIMEOUT_S": "10",
        }
        if mechanism != "OAUTHBEARER":
            names |= {"SASL_USERNAME": user, "SASL_PASSWORD": PASSWORDS[user]}
        variables = {f"TOCSIN_KAFKA__{name}": value for name, value in names.items()}
        return dict(environment_for(self.kafka.sasl_ssl, self.redis_url, self.unique)) | variables | more

    def settings(self, user: str = "tocsin", mechanism: str = "SCRAM-SHA-512", **more: str) -> Settings:
        return load_settings(self.environment(user, mechanism, **more))

    def rights(self, worker: str = "User:tocsin", **more: str) -> list[AclBinding]:
        """Return what deploy/acl gives for these names."""
        kafka = self.settings().kafka
        return rights(
            GROUP=kafka.group,
            POINTS=kafka.points_topic,
            ANOMALIES=kafka.anomalies_topic,
            SHADOW=kafka.shadow_topic,
            REJECTS=kafka.rejects_topic,
            WORKER=worker,
            **more,
        )

    async def set_up(self, **more: str) -> list[AclBinding]:
        """Make the topics, and give the rights; returns them."""
        kafka = self.settings().kafka
        topics = (kafka.points_topic, kafka.anomalies_topic, kafka.rejects_topic, kafka.shadow_topic)
        await asyncio.to_thread(self.kafka.create, *topics, partitions=kafka.partitions)
        given = self.rights(**more)
        await asyncio.to_thread(self.kafka.allow, given)
        return given


@pytest.fixture
def place(secure: SecureKafka, redis_url: str, unique: str) -> Place:
    return Place(secure, redis_url, unique)


# -- the ways in ------------------------------------------------------------------------------------------------------


def ways_in(kafka: SecureKafka, tmp_path: Path) -> dict[str, dict[str, str]]:
    """Return settings for each way in that the broker has."""
    token = tmp_path / "token"
    token.write_text(kafka.token("tocsin") + "\n")
    tls = {"SSL_CAFILE": kafka.authority.cafile}
    login = {"SASL_USERNAME": "tocsin", "SASL_PASSWORD": PASSWORDS["tocsin"]}
    certificate = {
        "SSL_CERTFILE": kafka.authority.client("tocsin", password="k3y-s3cret"),
        "SSL_KEYPASSWORD": "k3y-s3cret",
    }
    over_tls = {"BOOTSTRAP_SERVERS": kafka.sasl_ssl, "SECURITY_PROTOCOL": "SASL_SSL", **tls}
    return {
        "PLAIN": {**over_tls, "SASL_MECHANISM": "PLAIN", **login},
        "SCRAM-SHA-256": {**over_tls, "SASL_MECHANISM": "SCRAM-SHA-256", **login},
        "SCRAM-SHA-512": {**over_tls, "SASL_MECHANISM": "SCRAM-SHA-512", **login},
        "OAUTHBEARER": {**over_tls, "SASL_MECHANISM": "OAUTHBEARER", "SASL_TOKEN_FILE": str(token)},
        "client certificate": {"BOOTSTRAP_SERVERS": kafka.mtls, "SECURITY_PROTOCOL": "SSL", **tls, **certificate},
        "in the clear": {
            "BOOTSTRAP_SERVERS": kafka.sasl_plain,
            "SECURITY_PROTOCOL": "SASL_PLAINTEXT",
            "SASL_MECHANISM": "SCRAM-SHA-512",
            **login,
        },
    }


async def test_every_way_in_leads_to_the_same_user(place: Place, tmp_path: Path) -> None:
    await place.set_up(PRODUCER="User:tocsin", READER="User:tocsin")
    ways = ways_in(place.kafka, tmp_path)
    for name, way in ways.items():
        variables = {f"TOCSIN_KAFKA__{key}": value for key, value in way.items()}
        settings = load_settings(dict(environment_for("", place.redis_url, place.unique)) | variables)
        await send(settings.kafka, [(name, START_MS, 1.0)])
        found = [record.key.decode() for record in await read_all(settings.kafka, settings.kafka.points_topic)]
        assert name in found, "each was read by way of the same way"
    assert set(found) == set(ways)


@dataclass(frozen=True)
class Wrong:
    """Settings that the broker does not accept, and what is said of them."""

    way: str
    change: Mapping[str, str]
    said: str


WRONGS = {
    "password, PLAIN": Wrong("PLAIN", {"SASL_PASSWORD": WRONG}, "Invalid username or password; see .*SASL_PASSWORD"),
    "password, SCRAM": Wrong("SCRAM-SHA-256", {"SASL_PASSWORD": WRONG}, "invalid credentials .*; see .*SASL_PASSWORD"),
    "user": Wrong("SCRAM-SHA-512", {"SASL_USERNAME": "nobody"}, "invalid credentials .*; see .*SASL_USERNAME"),
    "token of another": Wrong("OAUTHBEARER", {"SASL_TOKEN_FILE": "forged"}, "token is refused: .*SASL_TOKEN_FILE"),
    "token of the past": Wrong("OAUTHBEARER", {"SASL_TOKEN_FILE": "expired"}, "token is refused: .*SASL_TOKEN_FILE"),
    "mechanism": Wrong("in the clear", {"SASL_MECHANISM": "SCRAM-SHA-256"}, "does not take SCRAM-SHA-256; .*MECHANISM"),
    "authority": Wrong(
        "PLAIN", {"SSL_CAFILE": "other"}, "certificate is not accepted, .*; see TOCSIN_KAFKA__SSL_CAFILE"
    ),
    "the system's authorities": Wrong("PLAIN", {"SSL_CAFILE": ""}, "certificate is not accepted, .*SSL_CAFILE"),
    "no certificate": Wrong("client certificate", {"SSL_CERTFILE": "", "SSL_KEYPASSWORD": ""}, "ask for a certificate"),
    "protocol": Wrong("in the clear", {"SECURITY_PROTOCOL": "SASL_SSL"}, "speak SASL_SSL .*SECURITY_PROTOCOL"),
}


@pytest.mark.parametrize("name", WRONGS)
async def test_what_is_refused_is_said_with_its_setting_and_not_tried_again(
    secure: SecureKafka, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = WRONGS[name]
    forged = tmp_path / "forged"
    forged.write_text(secure.token("tocsin", key=rsa.generate_private_key(public_exponent=65537, key_size=2048)))
    expired = tmp_path / "expired"
    expired.write_text(secure.token("tocsin", -60))
    files = {"forged": str(forged), "expired": str(expired), "other": Authority.new(tmp_path / "other").cafile}
    way = ways_in(secure, tmp_path)[wrong.way]
    variables = way | {key: files.get(value, value) for key, value in wrong.change.items()}
    async with Counting(int(way["BOOTSTRAP_SERVERS"].rpartition(":")[2])) as proxy:
        variables |= {"BOOTSTRAP_SERVERS": f"{LOOPBACK}:{proxy.port}", "CONNECT_TIMEOUT_S": "1"}
        settings = load_settings({f"TOCSIN_KAFKA__{key}": value for key, value in variables.items()})
        caplog.set_level(logging.DEBUG)
        with pytest.raises(BrokerError, match=wrong.said) as caught:
            await ensure_topics(settings.kafka, {})
        assert caught.value.exit_code == 1
        assert proxy.accepted <= (2 if "lets us not in" in str(caught.value) else 20)
    assert_silent(str(caught.value), caplog.text, secrets=[way.get("SASL_PASSWORD", ""), expired.read_text()])


class Counting(Proxy):
    """Counts the connections that come."""

    accepted = 0

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        await super()._connected(reader, writer)


def assert_silent(*said: str, secrets: list[str] | None = None) -> None:
    """Make sure that nothing secret is in what was said."""
    for secret in filter(None, [*PASSWORDS.values(), REDIS_PASSWORD, WRONG, *(secrets or [])]):
        for text in said:
            assert secret not in text


# -- rights -----------------------------------------------------------------------------------------------------------


async def test_the_service_works_with_the_rights_of_deploy_acl_and_says_which_one_is_missing(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    points = sample_points(2)
    async with SecureStore(REDIS_PASSWORD, prefix=f"tocsin-test-{place.unique}") as store:
        place.redis_url = store.url
        redis = {"TOCSIN_REDIS__SSL_CAFILE": store.authority.cafile, "TOCSIN_REDIS__USERNAME": "tocsin"}
        redis |= {"TOCSIN_REDIS__PASSWORD": REDIS_PASSWORD}
        worker, collector = place.settings(**redis), place.settings("collector", "PLAIN")
        oncall = place.settings("oncall", "SCRAM-SHA-256")
        given = await place.set_up(PRODUCER="User:collector", READER="User:oncall", OPERATOR="User:operator")

        async with working(worker):
            await replay(points, collector.kafka)
            producer = points_producer(collector.kafka)
            async with producer:
                await producer.send_and_wait(collector.kafka.points_topic, b"no point")
            await until_committed(worker.kafka, len(points.value) + 1)
            await until(lambda: kept(worker, len(points.names)), "the state of all series is in the store")
        events = await published(oncall.kafka)
        assert digest(events) == digest(backtested(points, worker))
        assert len(events) > 0
        (reject,) = await read_all(oncall.kafka, worker.kafka.rejects_topic)
        assert reject.value == b"no point"
        operator = place.settings("operator")
        log = await read_log(operator.kafka)
        assert sum(part.end for part in log.parts.values()) >= len(points.value) + 1
        assert (await retry(operator.kafka, Wanted())).sent.total() == 1
        async with working(worker) as second:  # restores what the first wrote
            assert sum(len(one.detector.index.names) for one in second.partitions.values()) == len(points.names)
        assert [line.split(": ")[1] for line in await check_servers(worker)] == ["fine", "fine"]

        own = [right for right in given if right.principal == "User:tocsin"]
        assert len(own) == 6, "each is taken away once"
        for right in own:
            await asyncio.to_thread(place.kafka.forbid, right)
            operation: Any = right.operation
            said = f"{operation.name.capitalize()} on (topic|group|transactional ids) {right.name}"
            with pytest.raises(BrokerError, match=f"allows user tocsin too little: it lacks {said}") as checked:
                await check_servers(worker)
            assert checked.value.exit_code == 1
            if right is own[-1]:
                with pytest.raises(BrokerError) as caught:
                    async with working(worker):
                        pass
                assert str(caught.value) == str(checked.value), "the service says it as soon as the check does"
            await asyncio.to_thread(place.kafka.allow, [right])
    assert_silent(caplog.text)


async def kept(settings: Settings, series: int) -> bool:
    async with Store.of(settings.redis) as store:
        kafka = settings.kafka
        found = [await store.load(kafka.group, kafka.points_topic, number) for number in range(kafka.partitions)]
    return sum(len([name for name in one.blobs if not name.startswith(b"\0")]) for one in found if one) == series


async def test_who_sends_and_who_follows_is_told_what_is_missing(place: Place) -> None:
    await place.set_up()
    collector, oncall = place.settings("collector", "PLAIN"), place.settings("oncall")
    topics = collector.kafka.points_topic, oncall.kafka.anomalies_topic
    with pytest.raises(BrokerError, match=f"user collector lacks the right to Describe topic {topics[0]}"):
        await replay(sample_points(1), collector.kafka)
    with pytest.raises(BrokerError, match=f"user oncall lacks the right to Describe topic {topics[1]}"):
        await anext(subscribe(oncall.kafka))
    # The other way round they may see the topic, and no more.
    swapped = place.rights(PRODUCER="User:oncall", READER="User:collector")
    await asyncio.to_thread(place.kafka.allow, swapped)
    with pytest.raises(BrokerError, match=f"user oncall lacks the right to Read topic {topics[0]}"):
        await anext(subscribe(oncall.kafka, topic=topics[0], start="earliest"))
    sender = collector.kafka.model_copy(update={"points_topic": topics[1]})
    with pytest.raises(BrokerError, match=f"user collector lacks the right to Write topic {topics[1]}"):
        await replay(sample_points(1), sender)


async def test_a_right_that_is_taken_away_at_work_ends_the_service_with_its_name(place: Place) -> None:
    given = await place.set_up(PRODUCER="User:collector")
    worker, collector = place.settings(), place.settings("collector", "PLAIN")
    service = make_worker(worker)
    running = asyncio.create_task(service.run())
    await until(service.assigned.is_set, "the worker has its partitions")
    await asyncio.to_thread(place.kafka.forbid, given[0])
    await send(collector.kafka, [("a", START_MS, 1.0)])
    with pytest.raises(BrokerError, match=f"user tocsin lacks the right to Read topic {given[0].name}"):
        await asyncio.wait_for(running, 60)
    await service.store.close()


async def test_a_check_says_what_is_wrong_with_either_server(place: Place, unused_port: int) -> None:
    place.redis_url = f"redis://:{REDIS_PASSWORD}@{LOOPBACK}:{unused_port}/0"
    more = {"TOCSIN_REDIS__CONNECT_TIMEOUT_S": "0.5", "TOCSIN_KAFKA__SASL_PASSWORD": WRONG}
    with pytest.raises(BrokerError) as caught:
        await check_servers(place.settings(**more))
    broker, store = str(caught.value).splitlines()
    assert "see TOCSIN_KAFKA__SASL_USERNAME and TOCSIN_KAFKA__SASL_PASSWORD" in broker
    assert f"cannot reach the store at redis://{LOOPBACK}:{unused_port}/0" in store
    assert_silent(str(caught.value))


# -- tokens -----------------------------------------------------------------------------------------------------------


async def test_tokens_run_out_while_the_service_works(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Renewed in their file, they are not noticed; not renewed, the service says so, and goes on once they are."""
    await place.set_up(PRODUCER="User:collector")
    file, collector = tmp_path / "token", place.settings("collector", "PLAIN")

    def renew(lifetime_s: float = 3) -> None:
        (tmp_path / "next").write_text(place.kafka.token("tocsin", lifetime_s))
        (tmp_path / "next").replace(file)

    async def keep_renewing() -> None:
        while True:
            renew()
            await asyncio.sleep(1)

    renewing = asyncio.create_task(keep_renewing())
    await until(file.exists, "the first token is there")
    worker = place.settings("tocsin", "OAUTHBEARER", TOCSIN_KAFKA__SASL_TOKEN_FILE=str(file))
    began, sent = time.monotonic(), 0

    async def send_some() -> None:
        nonlocal sent
        await send(collector.kafka, [(f"kpi.{sent}.{n}", START_MS + n, 1.0) for n in range(30)])
        sent += 30

    async with working(worker) as service:
        while time.monotonic() < began + 5:  # longer than a token lives
            await send_some()
            await until_committed(place.settings().kafka, sent)
        assert not service.not_ready()
        renewing.cancel()
        caplog.clear()
        await until(lambda: "refuses the login of" in caplog.text, "the broker refuses the last token")
        await send_some()
        await asyncio.sleep(3)  # a storm would be some 40 a second
        assert caplog.text.count("Unable connect to node") < 10
        assert caplog.text.count("refuses the login of") == 1
        assert str(file) in caplog.text
        renew(60)
        await until_committed(place.settings().kafka, sent)
        await until(lambda: not service.not_ready(), "the worker is ready again")
        assert caplog.text.count("lets") == 1
    assert_silent(caplog.text, secrets=[file.read_text()])


# -- the store --------------------------------------------------------------------------------------------------------


def redis_settings(store: SecureStore, **more: str) -> RedisSettings:
    given = {
        "url": store.url,
        "username": "tocsin",
        "password": REDIS_PASSWORD,
        "ssl_cafile": store.authority.cafile,
        "prefix": "tocsin",
    }
    return RedisSettings.model_validate(given | more)


async def set_user(admin: Redis, *rules: str) -> None:
    await admin.execute_command("ACL", "SETUSER", "tocsin", *rules)  # type: ignore[no-untyped-call]


async def connected(settings: RedisSettings, deadline_s: float = 5) -> None:
    async with Store.of(settings) as store:
        await store.connect(deadline_s)


async def test_each_right_of_the_store_that_is_missing_is_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with SecureStore(REDIS_PASSWORD) as store, store.admin() as admin:
        await connected(redis_settings(store))
        await connected(
            redis_settings(store, url=store.url.replace("//", f"//tocsin:{REDIS_PASSWORD}@"), username="", password="")
        )
        commands = (ACL_DIR / "users.acl").read_text().split("-@all")[1].split()
        assert "+hset" in commands
        for command in commands:
            await set_user(admin, f"-{command[1:]}")
            if command == "+client|setinfo":  # it names the client to the server, who may refuse
                await connected(redis_settings(store))
            else:
                with pytest.raises(StoreError, match=f"'{command[1:]}' command") as caught:
                    await connected(redis_settings(store))
                assert caught.value.exit_code == 1
            await set_user(admin, command)
        with pytest.raises(StoreError, match=r"allows us too little: .*a key .*deploy/acl/users\.acl"):
            await connected(redis_settings(store, prefix="other"))
        assert [key async for key in admin.scan_iter()] == [], "what was tried is gone"
    assert_silent(caplog.text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"password": WRONG},
            "invalid username-password pair.*; see TOCSIN_REDIS__USERNAME and TOCSIN_REDIS__PASSWORD",
        ),
        ({"username": "nobody"}, "invalid username-password pair.*; see TOCSIN_REDIS__USERNAME"),
        (
            {"url": "tocsin:" + WRONG, "username": "", "password": ""},
            "invalid username-password.*; see TOCSIN_REDIS__URL",
        ),
        ({"username": "", "password": ""}, "uthenticat.*; see TOCSIN_REDIS__URL"),
        ({"ssl_cafile": ""}, "certificate is not accepted, .*; see TOCSIN_REDIS__SSL_CAFILE"),
        ({"ssl_cafile": "other"}, "certificate is not accepted, .*; see TOCSIN_REDIS__SSL_CAFILE"),
        ({"url": "localhost"}, None),
    ],
    ids=str,
)
async def test_what_the_store_refuses_is_said_with_its_setting_and_not_tried_again(
    change: dict[str, str], said: str | None, tmp_path: Path
) -> None:
    other = Authority.new(tmp_path / "other").cafile
    async with SecureStore(REDIS_PASSWORD) as store:
        given = {name: other if value == "other" else value for name, value in change.items()}
        if "url" in change:
            host = change["url"] if "localhost" in change["url"] else f"{change['url']}@{LOOPBACK}"
            given["url"] = f"rediss://{host}:{store.tls_port}"
        settings = redis_settings(store, **given)
        if said is None:
            await connected(settings)
            return
        with pytest.raises(StoreError, match=said) as caught:
            await connected(settings, 20)
        assert store.logins <= 1
        assert_silent(str(caught.value), repr(settings))


async def test_a_store_that_lets_the_service_go_is_a_cache_that_is_away(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await place.set_up(PRODUCER="User:collector")
    collector = place.settings("collector", "PLAIN")
    async with SecureStore(REDIS_PASSWORD, prefix=f"tocsin-test-{place.unique}") as store, store.admin() as admin:
        place.redis_url = store.url
        more = {"TOCSIN_REDIS__SSL_CAFILE": store.authority.cafile, "TOCSIN_REDIS__USERNAME": "tocsin"}
        worker = place.settings(**more, TOCSIN_REDIS__PASSWORD=REDIS_PASSWORD, TOCSIN_REDIS__FLUSH_INTERVAL_S="0.2")
        async with working(worker):
            await set_user(admin, "off")
            await admin.client_kill_filter(user="tocsin")
            before = store.logins
            await send(collector.kafka, [(f"kpi.{n}", START_MS, 1.0) for n in range(10)])
            await until_committed(worker.kafka, 10)
            await until(lambda: "state not written" in caplog.text or "store" in caplog.text, "it is said")
            await asyncio.sleep(2)
            assert store.logins - before < 40, "three partitions, five flushes a second"
            await set_user(admin, "on")
            await until(lambda: kept(worker, 10), "the state is in the store")
    assert_silent(caplog.text)


# -- the command ------------------------------------------------------------------------------------------------------


async def tocsin(environment: Mapping[str, str], *arguments: str) -> tuple[int, str]:
    """Run the command; return its exit code and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "stream", *arguments),
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, said.decode()


async def test_exit_codes_tell_a_wrong_setting_from_a_refusal(place: Place, tmp_path: Path) -> None:
    await place.set_up()
    secret = tmp_path / "password"
    secret.write_text(PASSWORDS["tocsin"] + "\n")
    environment = place.environment(TOCSIN_LOG_LEVEL="DEBUG", XDG_RUNTIME_DIR=str(tmp_path))
    from_file = environment | {"TOCSIN_KAFKA__SASL_PASSWORD_FILE": str(secret)}
    del from_file["TOCSIN_KAFKA__SASL_PASSWORD"]
    wrong = environment | {"TOCSIN_KAFKA__SASL_PASSWORD": WRONG}
    missing = environment | {"TOCSIN_KAFKA__SSL_CAFILE": str(tmp_path / "no.pem")}
    fine, refused, absent = await asyncio.gather(
        tocsin(from_file, "check"), tocsin(wrong, "serve"), tocsin(missing, "serve")
    )
    assert fine[0] == 0, fine[1]
    assert fine[1].count(": fine") == 3
    assert refused[0] == 1 and "see TOCSIN_KAFKA__SASL_USERNAME and TOCSIN_KAFKA__SASL_PASSWORD" in refused[1]
    assert absent[0] == 2 and f"TOCSIN_KAFKA__SSL_CAFILE={tmp_path / 'no.pem'}: No such file" in absent[1]
    everything = fine[1] + refused[1] + absent[1]
    assert_silent(everything)
    assert "Traceback" not in everything
