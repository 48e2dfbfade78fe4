"""The service, hit by a signal at a step of `stream.steps`, the N-th time.

python -m tests.faults.dying STEP N           # SIGKILL: as a crash
python -m tests.faults.dying STEP N SIGSTOP   # paused, as by a hypervisor; the broker's patience is short then
"""

from __future__ import annotations

import os
import signal
import sys

from aiokafka import AIOKafkaProducer

from stream import kafka, steps
from stream.cli import main
from stream.outbox import TransactionalOutbox

TRANSACTION_TIMEOUT_MS = 1_000
SESSION_TIMEOUT_MS = 4_000


def hit_at(at: str, number: int, by: signal.Signals) -> None:
    """Have this process get a signal at a step."""
    left = number

    def reached(step: steps.Step) -> None:
        nonlocal left
        left -= step == at
        if step == at and not left:
            os.kill(os.getpid(), by)

    steps.reached = reached


def shorten_patience() -> None:
    """Have the broker abort a transaction, and the group give a member up, after seconds and not after a minute."""
    kafka._SESSION_TIMEOUT_MS = SESSION_TIMEOUT_MS
    TransactionalOutbox._made = short_lived  # type: ignore[method-assign]


def short_lived(self: TransactionalOutbox) -> AIOKafkaProducer:
    """Return the producer of an outbox, whose transactions the broker aborts after a second."""
    producer = kafka.transactional_producer(self.settings, self.at)
    producer._txn_manager.transaction_timeout_ms = TRANSACTION_TIMEOUT_MS
    return producer


def run() -> None:
    """Be the service; what the arguments say happens to it."""
    step, number, *signals = sys.argv[1:]
    hit_at(step, int(number), signal.Signals[signals[0]] if signals else signal.SIGKILL)
    if signals:
        shorten_patience()
    sys.argv[1:] = ["serve"]
    main()


if __name__ == "__main__":
    run()
