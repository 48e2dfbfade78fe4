"""Which servers are meant: those that the settings name, else those of a running `tocsin up`.

That tells other terminals of them by a small file in this user's runtime directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stream.embedded import Servers, patch_aborted_transactions
from stream.errors import ConfigError
from stream.settings import Settings


@contextlib.contextmanager
def announce(servers: Servers) -> Iterator[None]:
    """Let `discover` in other processes of this user find these servers until the block ends.

    Raises:
        ConfigError: the runtime directory belongs to someone else.
    """
    directory = _runtime_dir()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"{directory} cannot be made ({e.strerror}): set XDG_RUNTIME_DIR to one of yours") from e
    if not _is_ours(directory):
        raise ConfigError(f"{directory} must belong to you alone (mode 0700): remove it, or set XDG_RUNTIME_DIR")
    path = directory / f"up-{os.getpid()}.json"
    scratch = path.with_suffix(".tmp")
    with scratch.open("w") as file:
        # Held until this process ends, by whatever cause: what tells a live announcement from a left-over.
        fcntl.flock(file, fcntl.LOCK_EX)
        fields = {
            "pid": os.getpid(),
            "bootstrap_servers": servers.bootstrap_servers,
            "redis_url": servers.redis_url,
            "data_dir": str(servers.data_dir),
        }
        file.write(json.dumps(fields))
        file.flush()
        scratch.replace(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def discover() -> Servers | None:
    """Return the servers that a running process of this user has announced, the latest if several, or None."""
    directory = _runtime_dir()
    if not _is_ours(directory):
        return None
    found: list[tuple[float, Servers]] = []
    for path in directory.glob("up-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), path.open() as file:
            if not _is_locked(file.fileno()):
                path.unlink(missing_ok=True)  # its process was killed
                continue
            fields = json.load(file)
            os.kill(fields["pid"], 0)
            servers = Servers(fields["bootstrap_servers"], fields["redis_url"], Path(fields["data_dir"]))
            found.append((os.fstat(file.fileno()).st_mtime, servers))
    return max(found, key=lambda each: each[0])[1] if found else None


def _is_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _runtime_dir() -> Path:
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "tocsin"
    return Path(tempfile.gettempdir()) / f"tocsin-{os.getuid()}"


def _is_ours(directory: Path) -> bool:
    """Tell whether nobody else can have put a file there: others' servers must not be taken for ours."""
    try:
        status = directory.lstat()
    except OSError:
        return False
    is_directory = not directory.is_symlink() and directory.is_dir()
    return is_directory and status.st_uid == os.getuid() and not status.st_mode & 0o077


def with_servers(settings: Settings, servers: Servers) -> Settings:
    """Return the settings pointed at embedded servers, and make this process able to read from them."""
    patch_aborted_transactions()
    return settings.model_copy(
        update={
            "kafka": settings.kafka.without_security(servers.bootstrap_servers),
            "redis": settings.redis.without_security(servers.redis_url),
        }
    )


def find_servers(settings: Settings, *, store: bool = True) -> Settings:
    """Return settings that name a broker (and a store): the user's own, else those of a running `tocsin up`.

    Raises:
        ConfigError: neither is there; the message names the setting.
    """
    missing = [
        name
        for name, value, needed in (
            ("TOCSIN_KAFKA__BOOTSTRAP_SERVERS", settings.kafka.bootstrap_servers, True),
            ("TOCSIN_REDIS__URL", settings.redis.url.get_secret_value(), store),
        )
        if needed and not value
    ]
    if not missing:
        return settings
    running = discover() if not settings.kafka.bootstrap_servers else None
    if running is None:
        raise ConfigError(f"{' and '.join(missing)}: not set, and no `tocsin up` is running")
    return with_servers(settings, running)
