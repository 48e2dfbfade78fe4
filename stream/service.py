"""Puts the parts together: settings -> checkpoint, detector, store, worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from models import repository
from models.checkpoint import Checkpoint
from stream.detector import Detector
from stream.errors import BrokerError, CheckpointError, ConfigError, TocsinError
from stream.registry import Chosen, Registry, features_of
from stream.reload import RulesFile
from stream.rights import require_rights
from stream.ruleset import RuleSet
from stream.settings import Settings
from stream.store import Store
from stream.worker import Worker

log = logging.getLogger(__name__)

_TURN_S = 0.0005


def use_one_thread() -> None:
    """Keep torch on one core: two intra-op threads on a busy machine stall a forward pass for tens of milliseconds."""
    torch.set_num_threads(1)


def take_short_turns() -> None:
    """Let the event loop have its turn soon while a batch is judged in its thread; Python's own pace is 5 ms."""
    sys.setswitchinterval(_TURN_S)


def load_checkpoint(settings: Settings, ref: str | None = None) -> Checkpoint:
    """Load the checkpoint that the settings (or `ref`) name.

    Raises:
        ConfigError: there is none of that name or version.
        CheckpointError: it is there and cannot be used.
    """
    where, ref = settings.roots(), ref or settings.checkpoint
    try:
        return repository.load(where, ref)
    except CheckpointError as e:
        if repository.is_absent(where, ref):
            raise ConfigError(str(e)) from None
        raise


def load_rules(settings: Settings) -> RuleSet:
    """Return the rules that the settings name, or the one rule that they make.

    Raises:
        ConfigError: the file is wrong.
    """
    file = rules_file(settings)
    return RuleSet.default(settings.policy()) if file is None else file.current


def rules_file(settings: Settings) -> RulesFile | None:
    """Return the rules file that the settings name, to be watched.

    Raises:
        ConfigError: it is wrong.
    """
    if not settings.rules:
        return None
    kafka = settings.kafka
    own = (kafka.points_topic, kafka.anomalies_topic, kafka.rejects_topic, kafka.shadow_topic)
    return RulesFile(Path(settings.rules), settings.policy(), q_max=settings.pot.config().q_max, reserved_topics=own)


def registry(settings: Settings) -> Registry:
    """Return what reads the checkpoints that rules ask for."""
    return Registry(settings.roots(), settings.checkpoint, settings.pot.config(), source=settings.rules)


def detector_factory(
    settings: Settings,
    rules: RuleSet | None = None,
    checkpoint: Checkpoint | None = None,
    models: Registry | None = None,
) -> Callable[[], Detector]:
    """Return a function that makes a detector without series, one for each partition.

    Args:
        settings: what is the same for all series.
        rules: None: those that the settings name.
        checkpoint: of rules that name none; None: that of the settings.
        models: keeps the checkpoints in use, and goes on without one that cannot be; None: each has to be fine.

    Raises:
        ConfigError: the rules are wrong, or one names a checkpoint that is not there.
        CheckpointError: one cannot be used.
    """
    rules = load_rules(settings) if rules is None else rules
    config = settings.detector()
    chosen = (models or registry(settings)).choose(rules.rules, checkpoint, strict=models is None)
    for problem in rules.hidden(features_of(rules.rules, chosen)):
        log.warning("%s: %s", settings.rules, problem)
    for one in {one.ref: one for one in chosen.served + chosen.shadows if one is not None}.values():
        log.info("checkpoint %s, window %d, features %d", one.ref, one.model.window, one.model.features)

    def make() -> Detector:
        return Detector(config, rules.rules, chosen.served, shadows=chosen.shadows, general=chosen.general)

    return make


def explain(settings: Settings, names: Sequence[str], *, entity: bool = False) -> list[str]:
    """Return, line by line, which rule each KPI (or entity) of these names falls under, and what that asks.

    Raises:
        ConfigError: the rules are wrong, or one names a checkpoint that is not there.
        CheckpointError: one cannot be used.
    """
    rules, chosen = _checked(settings)
    features, q_max = features_of(rules.rules, chosen), settings.pot.config().q_max
    lines = []
    for name in names:
        lines += rules.explain(name, entity=entity, features=features, q_max=q_max)
        found = rules.find(name, entity=entity, features=features)
        one = None if found is None else chosen.served[found]
        if one is not None and one.members and name not in one.members:
            lines.append(f"  {one.ref} has no weights for it: {chosen.general.ref} judges it")
    return lines


def check_rules(settings: Settings) -> list[str]:
    """Load rules and checkpoints; return a line about each.

    Raises:
        ConfigError: the rules are wrong, or one names a checkpoint that is not there.
        CheckpointError: one cannot be used.
    """
    rules, chosen = _checked(settings)
    if problems := rules.hidden(features_of(rules.rules, chosen)):
        raise ConfigError("\n".join(f"{settings.rules}: {problem}" for problem in problems))
    refs = dict.fromkeys(one.ref for one in chosen.served + chosen.shadows if one is not None)
    lines = [f"checkpoint {ref}: fine" for ref in refs]
    return [f"rules {settings.rules}: {len(rules.rules)}, fine", *lines] if settings.rules else lines


def _checked(settings: Settings) -> tuple[RuleSet, Chosen]:
    rules = load_rules(settings)
    return rules, registry(settings).choose(rules.rules, strict=True)


def make_worker(settings: Settings) -> Worker:
    """Return a worker as the settings ask for it, not started."""
    use_one_thread()
    take_short_turns()
    file, models = rules_file(settings), registry(settings)

    def detectors(rules: RuleSet | None) -> Callable[[], Detector]:
        return detector_factory(settings, rules, models=models)

    store = Store.of(settings.redis)
    return Worker(settings, detectors, store, file, models)


async def serve(settings: Settings) -> None:
    """Run a worker until SIGTERM or SIGINT; everything taken in is settled and flushed then."""
    worker = make_worker(settings)
    # Before anything runs beside this: until then SIGTERM ends the program where it stands.
    with stop_on_signals(worker.stop):
        try:
            await worker.run()
        finally:
            await worker.store.close()


@contextlib.contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on the first SIGTERM or SIGINT; a second SIGINT interrupts."""
    loop = asyncio.get_running_loop()

    def first(number: signal.Signals) -> None:
        loop.remove_signal_handler(number)
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, first, number)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def check_servers(settings: Settings) -> list[str]:
    """Try the broker and the store, both of them whatever is wrong with one; return a line about each.

    Raises:
        BrokerError: the broker cannot be reached, or rights are missing; with what is wrong with the store.
        StoreError: the store alone cannot be reached or written, or rights are missing.
    """
    tried = await asyncio.gather(_check_broker(settings), _check_store(settings), return_exceptions=True)
    problems = [one for one in tried if isinstance(one, BaseException)]
    if len(problems) == 2 and all(isinstance(one, TocsinError) for one in problems):
        raise BrokerError("\n".join(map(str, problems))) from problems[0]
    for problem in problems:
        raise problem
    return [f"broker {settings.kafka.bootstrap_servers}: fine", "store: fine"]


async def _check_broker(settings: Settings) -> None:
    kafka = settings.kafka
    writes = (kafka.anomalies_topic, kafka.rejects_topic, kafka.shadow_topic)
    transactions = kafka.delivery == "exactly_once"
    await require_rights(kafka, reads=[kafka.points_topic], writes=writes, transactions=transactions)


async def _check_store(settings: Settings) -> None:
    async with Store.of(settings.redis) as store:
        await store.connect(settings.redis.connect_timeout_s)
        await store.check()
