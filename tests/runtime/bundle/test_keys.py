"""Key files: what is written, what is trusted, and everything that is refused."""

from __future__ import annotations

import base64
import os
import stat
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from edgewright.runtime.bundle import KeyPair, write_key_pair
from edgewright.runtime.bundle.keys import SMALL_ORDER, private_key, public_keys
from edgewright.runtime.errors import SignatureError
from edgewright.runtime.files import sha256_of

SPKI = bytes.fromhex("302a300506032b6570032100")  # RFC 8410, section 4: before the 32 bytes of a public key

P = 2**255 - 19  # the rest is RFC 8032, section 5.1: the oracle for the table of weak points
D = -121665 * pow(121666, -1, P) % P
ORDER = 2**252 + 27742317777372353535851937790883648493
Point = tuple[int, int]


def added(first: Point, second: Point) -> Point:
    """On −x² + y² = 1 + d x² y²."""
    (a, b), (c, d) = first, second
    product = D * a * b * c * d
    return (a * d + b * c) * pow(1 + product, -1, P) % P, (b * d + a * c) * pow(1 - product, -1, P) % P


def times(count: int, point: Point) -> Point:
    result = (0, 1)
    while count:
        if count & 1:
            result = added(result, point)
        point, count = added(point, point), count >> 1
    return result


def root(square: int) -> int | None:
    """A square root modulo p, which is 5 modulo 8."""
    for candidate in (pow(square, (P + 3) // 8, P), pow(square, (P + 3) // 8, P) * pow(2, (P - 1) // 4, P) % P):
        if candidate * candidate % P == square % P:
            return candidate
    return None


def point_of(y: int) -> Point | None:
    x = root((y * y - 1) * pow(D * y * y + 1, -1, P) % P)
    return None if x is None else (x, y % P)


def pem(raw: bytes) -> bytes:
    return b"-----BEGIN PUBLIC KEY-----\n" + base64.b64encode(SPKI + raw) + b"\n-----END PUBLIC KEY-----\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return write_key_pair(tmp_path_factory.mktemp("keys") / "pair")


def test_a_pair_fits_together(pair: KeyPair) -> None:
    (public,), private = public_keys(pair.public), private_key(pair.private)
    assert public.fits(private.signature(b"message"), b"message")
    assert not public.fits(private.signature(b"message"), b"massage")
    assert not public.fits(b"", b"message")
    assert public.fingerprint == private.fingerprint == pair.fingerprint


def test_the_files_are_what_other_programs_read(pair: KeyPair) -> None:
    private = serialization.load_pem_private_key(pair.private.read_bytes(), password=None)
    public = serialization.load_pem_public_key(pair.public.read_bytes())
    assert isinstance(private, ed25519.Ed25519PrivateKey)
    assert isinstance(public, ed25519.Ed25519PublicKey)
    raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    assert pair.fingerprint == sha256_of(raw)
    assert pem(raw) == pair.public.read_bytes()


def test_the_private_key_is_for_its_owner_alone(pair: KeyPair) -> None:
    assert stat.S_IMODE(pair.private.stat().st_mode) == 0o600


@pytest.mark.parametrize("suffix", [".key", ".pub"])
def test_no_key_is_overwritten(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pair{suffix}"
    path.write_bytes(b"mine")
    with pytest.raises(SignatureError, match="never overwritten"):
        write_key_pair(tmp_path / "pair")
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {path.name: b"mine"}


def test_a_folder_that_is_not_there_gets_no_key(tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match="cannot write the key"):
        write_key_pair(tmp_path / "missing" / "pair")


def test_a_file_may_hold_several_keys_and_comments(pair: KeyPair, tmp_path: Path) -> None:
    other, path = write_key_pair(tmp_path / "other"), tmp_path / "both.pub"
    path.write_bytes(b"# the old one\n" + pair.public.read_bytes() + b"\n # new\n" + other.public.read_bytes())
    assert [key.fingerprint for key in public_keys(path)] == [pair.fingerprint, other.fingerprint]


def _pem_of(key: object) -> bytes:
    content: bytes = key.public_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\n\n", "no public keys"),
        (b"# a comment\n", "no public keys"),
        (b"\xff\xfe", "not text"),
        (b"trust everybody", "no public keys"),
        (b"x" * (64 << 10) + b"x", "too large"),
        (pem(bytes(31)), "cannot be read"),
        (pem(b"\x58" + 31 * b"\x66") + b"and more", "something beside"),
        (pem(b"\x58" + 31 * b"\x66") + pem(bytes(32))[:60], "something beside"),
        (b"-----BEGIN PUBLIC KEY-----\n!!!!\n-----END PUBLIC KEY-----\n", "no public keys"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "cannot be read"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot be read"),
        (_pem_of(ec.generate_private_key(ec.SECP256R1()).public_key()), "not Ed25519"),
        (_pem_of(rsa.generate_private_key(65537, 1024).public_key()), "not Ed25519"),
        (_pem_of(ed448.Ed448PrivateKey.generate().public_key()), "not Ed25519"),
    ],
)
def test_a_key_file_that_holds_anything_else_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "trusted.pub"
    path.write_bytes(content)
    with pytest.raises(SignatureError, match=reason):
        public_keys(path)


def test_one_bad_key_among_good_ones_is_refused(pair: KeyPair, tmp_path: Path) -> None:
    path = tmp_path / "trusted.pub"
    path.write_bytes(pair.public.read_bytes() + pem(bytes(32)))
    with pytest.raises(SignatureError, match="weak"):
        public_keys(path)


def test_a_private_key_is_not_taken_for_a_public_one(pair: KeyPair) -> None:
    with pytest.raises(SignatureError, match="holds a private key"):
        public_keys(pair.private)


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe"):
        for load in (public_keys, private_key):
            with pytest.raises(SignatureError, match="there is no key file"):
                load(path)


def test_only_an_open_ed25519_key_signs(pair: KeyPair, tmp_path: Path) -> None:
    key, encoding = ed25519.Ed25519PrivateKey.generate(), serialization.Encoding.PEM
    locked = serialization.BestAvailableEncryption(b"secret")
    curve = ec.generate_private_key(ec.SECP256R1())
    cases = {
        "no private key": pair.public.read_bytes(),
        "no private key that": key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, locked),
        "not Ed25519": curve.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    }
    for reason, content in cases.items():
        (tmp_path / "it.key").write_bytes(content)
        with pytest.raises(SignatureError, match=reason):
            private_key(tmp_path / "it.key")


def test_the_table_of_weak_points_is_the_whole_torsion() -> None:
    """A point times the large prime order is left with a factor of 8: so all small orders are found from a few."""
    found: set[Point] = set()
    for point in filter(None, map(point_of, range(2, 12))):
        rest = times(ORDER, point)
        found |= {times(count, rest) for count in range(8)}
    assert len(found) == 8
    assert all(times(8, point) == (0, 1) for point in found)
    assert {y for _, y in found} == SMALL_ORDER


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("y", [*sorted(SMALL_ORDER), P, P + 1, 2**255 - 1, P + 3])
def test_weak_and_uncanonical_keys_are_refused(y: int, sign: int, tmp_path: Path) -> None:
    path = tmp_path / "weak.pub"
    path.write_bytes(pem((y | sign << 255).to_bytes(32, "little")))
    with pytest.raises(SignatureError, match="weak"):
        public_keys(path)


@pytest.mark.parametrize("sign", [0, 1])
def test_a_point_of_full_order_is_taken(sign: int, tmp_path: Path) -> None:
    y = 4 * pow(5, -1, P) % P  # the base point, RFC 8032, section 5.1
    path = tmp_path / "base.pub"
    path.write_bytes(pem((y | sign << 255).to_bytes(32, "little")))
    assert len(public_keys(path)) == 1


def test_without_cryptography_it_is_said_how_to_install_it(
    pair: KeyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for use in (lambda: public_keys(pair.public), lambda: private_key(pair.private), lambda: write_key_pair(tmp_path)):
        with pytest.raises(SignatureError, match=r"edgewright\[sign\].*python3-cryptography"):
            use()
