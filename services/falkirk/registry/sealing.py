"""The authority's private keys at rest: AES-256-GCM under a key that isn't in the store.

The sealing key comes from a file of the settings: `key_file` (made at the first start, 0600, 32 random bytes in hexadecimal) or `passphrase_file`, whose text is
stretched by scrypt (RFC 7914; N = 2^15, r = 8, p = 1: 32 MiB and a tenth of a second). A sealed key is version, kind, salt (16), nonce (12), text and tag; what it
is the key of is authenticated with it, so that one root's key doesn't pass for another's.

The default key file lies beside the store: it keeps the key out of copies of the store alone (backups), not from who can read the whole directory. To keep
it from those too, name a file on another disk, a secret that the orchestrator mounts, or a passphrase.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

VERSION: Final = 1
_BY_FILE: Final = 1
_BY_PASSPHRASE: Final = 2
_SALT: Final = 16
_NONCE: Final = 12
SHORTEST_PASSPHRASE: Final = 12


class Locked(Exception):
    """The sealing key isn't to be had, or isn't the one. The message says what to do."""


class Seal:
    """Seals and opens with what the settings name. Files are read each time: nothing of them stays in memory between."""

    def __init__(
        self, key_file: Path, passphrase_file: Path | None, random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._key_file, self._passphrase_file, self._random = key_file, passphrase_file, random

    def seal(self, secret: bytes, about: bytes) -> bytes:
        """Encrypt. Makes the key file where it is asked for and not there. Raises Locked."""
        if self._passphrase_file is None and not self._key_file.exists():
            self._make()
        kind = _BY_FILE if self._passphrase_file is None else _BY_PASSPHRASE
        salt, nonce = self._random(_SALT), self._random(_NONCE)
        head = bytes((VERSION, kind))
        return head + salt + nonce + AESGCM(self._key(kind, salt)).encrypt(nonce, secret, head + about)

    def open(self, sealed: bytes, about: bytes) -> bytes:
        """Decrypt. Raises Locked."""
        head, salt = sealed[:2], sealed[2 : 2 + _SALT]
        nonce, text = sealed[2 + _SALT : 2 + _SALT + _NONCE], sealed[2 + _SALT + _NONCE :]
        if len(head) < 2 or head[0] != VERSION or head[1] not in (_BY_FILE, _BY_PASSPHRASE):
            raise Locked("the authority's key is sealed in a way that this version doesn't know")
        try:
            return AESGCM(self._key(head[1], salt)).decrypt(nonce, text, head + about)
        except InvalidTag:
            name = self._key_file if head[1] == _BY_FILE else self._passphrase_file
            raise Locked(
                f"the authority's key wasn't sealed with {name}: put back the file it was sealed with"
            ) from None

    def _key(self, kind: int, salt: bytes) -> bytes:
        if kind == _BY_PASSPHRASE:
            if self._passphrase_file is None:
                raise Locked("the authority's key is sealed with a passphrase: set registry.authority.passphrase_file")
            text = _read(self._passphrase_file).rstrip(b"\r\n")
            if len(text) < SHORTEST_PASSPHRASE:
                raise Locked(f"{self._passphrase_file}: a passphrase has at least {SHORTEST_PASSPHRASE} bytes")
            return Scrypt(salt=salt, length=32, n=1 << 15, r=8, p=1).derive(text)
        try:
            secret = bytes.fromhex(_read(self._key_file).decode("ascii").strip())
        except ValueError:
            secret = b""
        if len(secret) < 32:
            raise Locked(f"{self._key_file}: holds no 32 bytes in hexadecimal")
        return HKDF(hashes.SHA256(), 32, salt, b"falkirk authority").derive(secret)

    def _make(self) -> None:
        try:
            self._key_file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, self._random(32).hex().encode() + b"\n")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise Locked(f"{self._key_file}: {error.strerror}") from error


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_mode & 0o077:
            raise Locked(f"{path}: may be read by others than its owner: chmod 600 it")
        return path.read_bytes()
    except OSError as error:
        raise Locked(f"{path}: {error.strerror}") from error
