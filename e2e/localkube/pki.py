"""Certificates, made with openssl at each start and valid for one year."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from localkube import shell

DAYS = "365"
CURVE = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-sha256"]


class Authority:
    """One CA in a folder of mode 0700; every certificate lies beside it as NAME.crt and NAME.key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path) -> Authority:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        shell.run(
            "openssl", "req", "-x509", *CURVE, "-days", DAYS, "-subj", "/CN=slmops-local-ca",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature",
            "-keyout", folder / "ca.key", "-out", folder / "ca.crt",
        )  # fmt: skip
        shell.run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", folder / "sa.key")
        shell.run("openssl", "ec", "-in", folder / "sa.key", "-pubout", "-out", folder / "sa.pub")
        return cls(folder)

    def cert(self, name: str) -> Path:
        return self.folder / f"{name}.crt"

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def client(self, name: str, user: str, group: str = "") -> None:
        subject = (f"/O={group}" if group else "") + f"/CN={user}"
        self._issue(name, subject, "clientAuth", ())

    def server(self, name: str, user: str, addresses: Sequence[str]) -> None:
        self._issue(name, f"/CN={user}", "serverAuth", addresses)

    def _issue(self, name: str, subject: str, usage: str, addresses: Sequence[str]) -> None:
        extra = ["-addext", f"subjectAltName={','.join(addresses)}"] if addresses else []
        shell.run(
            "openssl", "req", "-x509", *CURVE, "-days", DAYS, "-subj", subject,
            "-CA", self.folder / "ca.crt", "-CAkey", self.folder / "ca.key",
            "-addext", "basicConstraints=critical,CA:FALSE",
            "-addext", "keyUsage=critical,digitalSignature",
            "-addext", f"extendedKeyUsage={usage}", *extra,
            "-keyout", self.key(name), "-out", self.cert(name),
        )  # fmt: skip
