"""Certificates for tests: an authority, a server on loopback, clients; all in PEM files of a directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)


@dataclass(frozen=True)
class Authority:
    """A certificate authority that keeps what it makes in a directory."""

    dir: Path
    ca: trustme.CA

    @classmethod
    def new(cls, directory: Path) -> Authority:
        directory.mkdir(parents=True, exist_ok=True)
        ca = trustme.CA()
        ca.cert_pem.write_to_path(str(directory / "ca.pem"))
        return cls(directory, ca)

    @property
    def cafile(self) -> str:
        return str(self.dir / "ca.pem")

    def server(self, *names: str) -> str:
        """Return a file with key and certificate for these names; key first and PKCS 8, as Kafka wants them."""
        return self._write("server", self.ca.issue_cert(*names or ("127.0.0.1", "localhost")))

    def client(self, name: str, password: str = "") -> str:
        """Return a file with certificate and key of a client; with a password, the key is encrypted."""
        return self._write(name, self.ca.issue_cert(f"{name}@tocsin.test", common_name=name), password)

    def _write(self, name: str, made: trustme.LeafCert, password: str = "") -> str:
        key = load_pem_private_key(made.private_key_pem.bytes(), None)
        how = BestAvailableEncryption(password.encode()) if password else NoEncryption()
        parts = [key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)]
        parts += [part.bytes() for part in made.cert_chain_pems]
        path = self.dir / f"{name}.pem"
        path.write_bytes(b"".join(parts))
        return str(path)
