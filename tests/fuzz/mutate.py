"""Mutations of valid inputs: what disks, links and other people's programs do to bytes, and what an attacker would."""

from __future__ import annotations

import random
from collections.abc import Sequence

LENGTH_MAX = 200_000  # bytes of a mutated input: beyond it nothing new happens, only more slowly
NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63)
WORDS = (b"1e400", b"-0.0", b"1e308", b"NaN", b"-Infinity", b"9" * 400, b"null", b"true", b"\\ud800", b"\xff", b"\0")


def mutated(rng: random.Random, corpus: Sequence[bytes], words: Sequence[bytes] = ()) -> bytes:
    """Return one of the corpus after one to eight mutations; seldom as it is."""
    data: bytes = rng.choice(corpus)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 5, 8))):
        data = _once(rng, data, corpus, (*WORDS, *words))
        if len(data) > LENGTH_MAX:
            data = data[:LENGTH_MAX]
    return data


def _once(rng: random.Random, data: bytes, corpus: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    end = min(at + rng.choice((1, 1, 2, 4, 8, 16, 200)), len(data))
    kind = rng.randrange(11)
    if kind == 0 and at < len(data):  # a bit
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:  # cut off
        return data[:at]
    if kind == 2:  # a piece is lost
        return data[:at] + data[end:]
    if kind == 3:  # comes twice, or a thousand times
        return data[:end] + data[at:end] * rng.choice((1, 1, 3, 1000)) + data[end:]
    if kind == 4:  # noise
        return data[:at] + rng.randbytes(end - at) + data[end:]
    if kind == 5:  # a word of the language in it, or in place of something
        return bytes(data[:at] + rng.choice(words) + data[rng.choice((at, end)) :])
    if kind == 6:  # a number in binary: lengths, counts, times
        size = rng.choice((1, 2, 4, 8))
        number = (rng.choice(NUMBERS) + rng.randrange(-1, 2)) % 2 ** (8 * size)
        return bytes(data[:at] + number.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :])
    if kind == 7:  # the beginning of one, the end of another
        other = rng.choice(corpus)
        return data[:at] + other[rng.randrange(len(other) + 1) :]
    if kind == 8:  # two pieces change places
        other_at = rng.randrange(len(data) + 1)
        low, high = sorted((at, other_at))
        middle = rng.randrange(low, high + 1)
        return data[:low] + data[middle:high] + data[low:middle] + data[high:]
    if kind == 9:  # the same byte, many times
        return data[:at] + data[at : at + 1] * rng.choice((16, 300, 5000)) + data[at:]
    return data[:at] + _digits(rng) + data[end:]


def _digits(rng: random.Random) -> bytes:
    return str(
        rng.choice((rng.choice(NUMBERS), -rng.choice(NUMBERS), rng.random() * 10 ** rng.randrange(-9, 40)))
    ).encode()
