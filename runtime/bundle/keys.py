"""Ed25519 keys (RFC 8032) in PEM files, made and used by the package `cryptography` alone, from its version 3.4.8 on.

A key file that is missing, empty, broken or of another kind is an error and never means "no key".
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SignatureError
from ..files import sha256_of

__all__ = ["KeyPair", "PrivateKey", "PublicKey", "private_key", "public_keys", "write_key_pair"]

PRIVATE_SUFFIX, PUBLIC_SUFFIX = ".key", ".pub"
MOST_KEY_FILE_BYTES = 64 << 10
PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----\s[A-Za-z0-9+/=\s]+-----END \1-----")

P = 2**255 - 19  # RFC 8032, section 5.1
SMALL_ORDER = frozenset(
    int.from_bytes(bytes.fromhex(encoded), "little")
    for encoded in (
        "0000000000000000000000000000000000000000000000000000000000000000",  # order 4
        "0100000000000000000000000000000000000000000000000000000000000000",  # order 1
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",  # order 8
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",  # order 8
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",  # order 2
    )
)
"""y of the points whose order divides 8 (libsodium, `ge25519_has_small_order`): with such a public key, signatures
can be made that fit any message."""


@dataclass(frozen=True)
class PublicKey:
    """A key that is trusted; fingerprint: SHA-256 of its 32 bytes, hexadecimal."""

    fingerprint: str
    key: Any

    def fits(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` was made over `message` with the private half."""
        from cryptography.exceptions import InvalidSignature

        try:
            self.key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class PrivateKey:
    """A key to sign with; fingerprint: of its public half."""

    fingerprint: str
    key: Any

    def signature(self, message: bytes) -> bytes:
        """The 64 bytes of the signature; the same for the same message."""
        return bytes(self.key.sign(message))


@dataclass(frozen=True)
class KeyPair:
    """The files of a new pair, and its fingerprint."""

    private: Path
    public: Path
    fingerprint: str


def write_key_pair(prefix: Path) -> KeyPair:
    """Writes a new pair to `prefix`.key (for the owner alone, not encrypted) and `prefix`.pub.

    Raises `SignatureError` if either file exists or cannot be written.
    """
    ed25519, serialization = _library()
    key = ed25519.Ed25519PrivateKey.generate()
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    files = [(Path(f"{prefix}{PRIVATE_SUFFIX}"), private, 0o600), (Path(f"{prefix}{PUBLIC_SUFFIX}"), public, 0o644)]
    for path, _, _ in files:
        if os.path.lexists(path):
            raise SignatureError(f"{path} exists, and a key is never overwritten", "choose another prefix")
    written: list[Path] = []
    try:
        for path, content, mode in files:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
                written.append(path)
                stream.write(content)
    except OSError as error:
        for path in written:
            path.unlink()
        raise SignatureError(f"cannot write the key {path}: {error.strerror}", "choose another prefix") from error
    return KeyPair(files[0][0], files[1][0], _fingerprint(_raw(key.public_key())))


def private_key(file: Path) -> PrivateKey:
    """The key in the PEM file (PKCS #8, not encrypted). Raises `SignatureError` if it holds anything else."""
    ed25519, serialization = _library()
    content = _content(file)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except Exception as error:  # ValueError, TypeError, UnsupportedAlgorithm: by version and file
        raise SignatureError(
            f"{file} is no private key that can be read ({_first_line(error)})",
            "give the .key file that edgewright keygen wrote",
        ) from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise SignatureError(f"the key in {file} is not Ed25519", "make one with edgewright keygen")
    return PrivateKey(_fingerprint(_raw(key.public_key())), key)


def public_keys(file: Path) -> tuple[PublicKey, ...]:
    """The trusted keys of a PEM file, at least one; lines that begin with # are comments.

    Raises `SignatureError` if the file is missing, empty or broken, or if any of its keys is private, weak (its point
    has a small order, or is not encoded as RFC 8032, section 5.1.3, asks for) or not Ed25519.
    """
    content = _content(file)
    try:
        text = content.decode("ascii")
    except UnicodeDecodeError:
        raise SignatureError(f"{file} is not text", "give the .pub file that edgewright keygen wrote") from None
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    blocks = [(match.group(1), match.group(0)) for match in PEM.finditer(text)]
    if any("PRIVATE" in kind for kind, _ in blocks):
        raise SignatureError(f"{file} holds a private key", "keep it off the device and give the .pub file")
    if not blocks or PEM.sub("", text).strip():
        raise SignatureError(
            f"{file} holds {'something beside' if blocks else 'no'} public keys",
            "give the .pub file that edgewright keygen wrote",
        )
    return tuple(_public_key(block.encode(), file) for _, block in blocks)


def _public_key(block: bytes, file: Path) -> PublicKey:
    ed25519, serialization = _library()
    try:
        key = serialization.load_pem_public_key(block)
    except Exception as error:  # ValueError, UnsupportedAlgorithm: by version and file
        raise SignatureError(f"a key in {file} cannot be read ({_first_line(error)})", "copy the file again") from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise SignatureError(f"a key in {file} is not Ed25519", "make one with edgewright keygen")
    raw = _raw(key)
    if _is_weak(raw):
        raise SignatureError(f"a key in {file} is weak: anybody can sign for it", "make one with edgewright keygen")
    return PublicKey(_fingerprint(raw), key)


def _is_weak(raw: bytes) -> bool:
    """Whether the point has a small order, or y is not below p; the highest bit is the sign of x."""
    y = int.from_bytes(raw, "little") & (2**255 - 1)
    return y >= P or y in SMALL_ORDER


def _content(file: Path) -> bytes:
    """At most as much as a key file can hold; of a pipe nothing."""
    if not file.is_file():
        raise SignatureError(f"there is no key file {file}", "check the path; without its key nothing is trusted")
    try:
        with file.open("rb") as stream:
            content = stream.read(MOST_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise SignatureError(f"cannot read the key file {file}: {error.strerror}") from error
    if not 1 <= len(content) <= MOST_KEY_FILE_BYTES:
        raise SignatureError(f"the key file {file} is {'too large' if content else 'empty'}", "copy it again")
    return content


def _raw(key: Any) -> bytes:
    _, serialization = _library()
    return bytes(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))


def _fingerprint(raw: bytes) -> str:
    return sha256_of(raw)


def _library() -> tuple[Any, Any]:
    """`ed25519` and `serialization` of cryptography. Raises `SignatureError` if it is not installed."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise SignatureError(
            f"signatures need the package cryptography, which cannot be imported here ({error})",
            "pip install 'edgewright[sign]', or apt install python3-cryptography",
        ) from error
    return ed25519, serialization


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
