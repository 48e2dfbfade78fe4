"""From a CSV file on the disk to its lines, and from a line to its fields."""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

import numpy as np
import numpy.typing as npt

from stream.errors import InputError

BYTES_MAX: Final = 1 << 30  # of a file, unpacked
LINE_MAX: Final = 1 << 20  # characters of a line: thousands of columns
_PIECE: Final = 1 << 18
_EXPANSION_MAX: Final = 200  # times that a gzip file may grow; deflate could a thousand times …
_ALWAYS_BYTES: Final = 64 << 20  # … and so far it may anyway

DAMAGED: Final = re.compile("[\0\udc80-\udcff]")  # NUL, or a byte that is not UTF-8 (surrogateescape)
_SEP_LINE: Final = re.compile(r"sep=([,;\t])", re.IGNORECASE)
_BINARY: Final = (b"PK\x03\x04", b"PAR1", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"SQLite format", b"\x89HDF")
_CONTROL: Final = bytes(sorted(set(range(1, 32)) - set(b"\t\n\r\f")))
EXPECTED: Final = "expected lines such as `1469376000,0.84` or `2016-07-24 16:00:00,0.84`, with a header or without"


def read_bytes(path: Path) -> bytes:
    """Return the file's bytes, decompressed."""
    try:
        with path.open("rb") as file:
            data = read_at_most(file, BYTES_MAX + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of a CSV file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a directory, not a file; name the CSV files in it") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    _check_size(path, data)
    if data[:2] == b"\x1f\x8b":
        most = max(_EXPANSION_MAX * len(data), _ALWAYS_BYTES)
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
                text = read_at_most(packed, min(most, BYTES_MAX) + 1)
            _check_size(path, text)
            if len(text) > most:
                raise InputError(
                    f"{path}: unpacks to more than {_EXPANSION_MAX} times its size, which no measured values do; "
                    "if you trust the file, unpack it first"
                )
            return text
        except (OSError, EOFError, zlib.error) as error:
            # Half a file would be replayed as if it were the whole, and end in a false silence.
            raise InputError(f"{path}: damaged or cut-off gzip ({error}); fetch the file again") from None
    return data


def read_at_most(file: IO[bytes] | gzip.GzipFile, size: int) -> bytes:
    """Return what a file holds, up to so many bytes: `read(size)` would take the memory for all of them at once."""
    parts: list[bytes] = []
    while size > 0 and (part := file.read(min(size, _PIECE))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _check_size(path: Path, data: bytes) -> None:
    if len(data) > BYTES_MAX:
        raise InputError(f"{path}: larger than {BYTES_MAX:,} bytes; split it, by KPI or by time")


def decode(path: Path, data: bytes) -> str:
    """Return the text; bytes that are not UTF-8 become lone surrogates, which spoil their line only."""
    if not data.strip(b"\0 \t\r\n\xef\xbb\xbf"):
        raise InputError(f"{path}: {'only NUL bytes and blanks' if data else 'empty'}; {EXPECTED}")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path}: UTF-16 text; save it as UTF-8")
    head = data[:65_536].replace(b"\0", b"")  # a crash leaves runs of NUL in good text
    control = len(head) - len(head.translate(None, _CONTROL))
    if data.startswith(_BINARY) or control > 0.02 * len(head) + 2:
        raise InputError(f"{path}: a binary file, begins with {data[:8]!r}; {EXPECTED}")
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def content(path: Path, text: str) -> tuple[npt.NDArray[np.int64], list[str], str | None]:
    """Return the lines that count with their numbers, and the separator that a `sep=` line names."""
    lines = text.split("\n")
    if (longest := max(map(len, lines))) > LINE_MAX:
        number = next(i for i, line in enumerate(lines, 1) if len(line) == longest)
        raise InputError(f"{path}: line {number} has {longest:,} characters, at most {LINE_MAX:,}; {EXPECTED}")
    numbers = [i for i, line in enumerate(lines) if (blank := line.lstrip()) and blank[0] != "#"]
    separator = None
    if numbers and (match := _SEP_LINE.fullmatch(lines[numbers[0]].strip(' "'))):
        separator = match[1]
        numbers = numbers[1:]
    if not numbers:
        raise InputError(f"{path}: no lines but blank ones and comments; {EXPECTED}")
    texts = lines if len(numbers) == len(lines) else [lines[i] for i in numbers]
    return np.array(numbers, np.int64) + 1, texts, separator


def split(lines: Sequence[str], separator: str) -> list[list[str]]:
    """Split lines into fields; a line with damaged quotes or bytes gives no fields."""
    joined = "".join(lines)
    if joined.isascii() and '"' not in joined and "\0" not in joined:
        return [line.split(separator) for line in lines]
    return [_split_careful(line, separator) for line in lines]


def _split_careful(line: str, separator: str) -> list[str]:
    if DAMAGED.search(line):
        return []
    if '"' not in line:
        return line.split(separator)
    try:
        # A reader a line: an open quote must not swallow the lines below.
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True))
    except csv.Error:
        return []
