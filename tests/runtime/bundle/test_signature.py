"""The envelope: its published vectors, an independent verification of ours, and everything that is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from edgewright.runtime.bundle import KeyPair, write_key_pair
from edgewright.runtime.bundle.keys import private_key, public_keys
from edgewright.runtime.bundle.signature import pre_authentication_encoding, signed_envelope, signer
from edgewright.runtime.errors import BundleError, SignatureError

MANIFEST = b'{"any": "bytes \xff, they are not parsed"}'
PKCS8 = bytes.fromhex("302e020100300506032b657004220420")  # RFC 8410, section 7: before the 32 bytes of a private key
SPKI = bytes.fromhex("302a300506032b6570032100")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return write_key_pair(tmp_path_factory.mktemp("keys") / "pair")


@pytest.fixture(scope="module")
def envelope(pair: KeyPair) -> bytes:
    return signed_envelope(MANIFEST, private_key(pair.private))


def pem(kind: str, der: bytes) -> bytes:
    return f"-----BEGIN {kind}-----\n{base64.b64encode(der).decode()}\n-----END {kind}-----\n".encode()


@pytest.mark.parametrize(
    ("secret", "public", "message", "signature"),
    [  # RFC 8032, section 7.1, TEST 1 and TEST 2
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0"
            "595bbe24655141438e7a100b",
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eae"
            "b4302aeeb00d291612bb0c00",
        ),
    ],
)
def test_ed25519_is_that_of_rfc_8032(secret: str, public: str, message: str, signature: str, tmp_path: Path) -> None:
    (tmp_path / "it.key").write_bytes(pem("PRIVATE KEY", PKCS8 + bytes.fromhex(secret)))
    (tmp_path / "it.pub").write_bytes(pem("PUBLIC KEY", SPKI + bytes.fromhex(public)))
    key, (trusted,) = private_key(tmp_path / "it.key"), public_keys(tmp_path / "it.pub")
    assert key.signature(bytes.fromhex(message)).hex() == signature
    assert trusted.fits(bytes.fromhex(signature), bytes.fromhex(message))
    assert key.fingerprint == trusted.fingerprint


def test_the_encoding_is_that_of_dsse() -> None:
    """The example of its protocol.md."""
    encoded = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_the_lengths_in_the_encoding_count_bytes() -> None:
    assert pre_authentication_encoding("ä", b"\xff ") == b"DSSEv1 2 \xc3\xa4 2 \xff "


def test_others_can_verify_the_envelope(pair: KeyPair, envelope: bytes) -> None:
    content: dict[str, Any] = json.loads(envelope)
    payload, kind = base64.b64decode(content["payload"]), content["payloadType"]
    message = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind.encode(), str(len(payload)).encode(), payload])
    (signature,) = content["signatures"]
    key: Any = load_pem_public_key(pair.public.read_bytes())
    key.verify(base64.b64decode(signature["sig"]), message)  # raises unless it fits
    assert payload == MANIFEST
    assert kind == "application/vnd.edgewright.bundle+json"


def test_a_signature_by_a_trusted_key_is_named(pair: KeyPair, envelope: bytes, tmp_path: Path) -> None:
    other = write_key_pair(tmp_path / "other")
    assert signer(MANIFEST, envelope, public_keys(pair.public)) == pair.fingerprint
    assert signer(MANIFEST, envelope, (*public_keys(other.public), *public_keys(pair.public))) == pair.fingerprint


def test_one_of_several_signatures_is_enough(pair: KeyPair, envelope: bytes, tmp_path: Path) -> None:
    other = write_key_pair(tmp_path / "other")
    both, second = json.loads(envelope), json.loads(signed_envelope(MANIFEST, private_key(other.private)))
    both["signatures"] += second["signatures"]
    for trusted in (pair, other):
        assert signer(MANIFEST, json.dumps(both).encode(), public_keys(trusted.public)) == trusted.fingerprint


def test_without_a_required_key_nobody_is_named(envelope: bytes) -> None:
    assert signer(MANIFEST, None, None) is None
    assert signer(MANIFEST, envelope, None) is None


def test_no_signature_where_one_is_required_is_refused(pair: KeyPair) -> None:
    with pytest.raises(SignatureError, match="is not signed"):
        signer(MANIFEST, None, public_keys(pair.public))


def test_a_signature_by_somebody_else_is_refused(envelope: bytes, tmp_path: Path) -> None:
    other = write_key_pair(tmp_path / "other")
    with pytest.raises(SignatureError, match=f"trusted here is {other.fingerprint[:16]}"):
        signer(MANIFEST, envelope, public_keys(other.public))


def test_somebody_elses_signature_under_a_trusted_name_is_refused(pair: KeyPair, tmp_path: Path) -> None:
    other = write_key_pair(tmp_path / "other")
    content = json.loads(signed_envelope(MANIFEST, private_key(other.private)))
    content["signatures"][0]["keyid"] = pair.fingerprint
    with pytest.raises(SignatureError, match="does not fit the bundle"):
        signer(MANIFEST, json.dumps(content).encode(), public_keys(pair.public))


def test_the_payload_alone_is_not_what_is_signed(pair: KeyPair, envelope: bytes) -> None:
    content = json.loads(envelope)
    content["signatures"][0]["sig"] = base64.b64encode(private_key(pair.private).signature(MANIFEST)).decode()
    with pytest.raises(SignatureError, match="does not fit the bundle"):
        signer(MANIFEST, json.dumps(content).encode(), public_keys(pair.public))


def _set(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update(fields)


def _sign(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["signatures"][0].update(fields)


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set(payload=base64.b64encode(MANIFEST + b" ").decode()), "another manifest"),
        (_set(payload=base64.b64encode(MANIFEST).decode() + "\n"), "another manifest"),
        (_set(payload=None), "another manifest"),
        (_set(payloadType="application/json"), "another type"),
        (_set(more=1), "has the fields"),
        (lambda content: content.pop("payloadType"), "has the fields"),
        (_set(signatures=[]), "no list of 1 to 16"),
        (_set(signatures={}), "no list of 1 to 16"),
        (_set(signatures=[{"keyid": f"{n:064x}", "sig": "A" * 86 + "=="} for n in range(17)]), "no list of 1 to 16"),
        (_set(signatures=["x"]), "without keyid and sig"),
        (lambda content: content["signatures"][0].pop("keyid"), "without keyid and sig"),
        (_sign(more=1), "or with more"),
        (_sign(keyid="me"), "keyid that is no SHA-256"),
        (_sign(keyid=7), "keyid that is no SHA-256"),
        (_sign(sig=""), "not 64 bytes"),
        (_sign(sig=7), "not 64 bytes"),
        (_sign(sig="A" * 84), "not 64 bytes"),
        (_sign(sig="A" * 85 + "B=="), "not 64 bytes"),
        (_sign(sig="ä" * 86), "not 64 bytes"),
        (lambda content: content["signatures"].append(content["signatures"][0]), "two signatures by one key"),
    ],
)
def test_an_envelope_of_another_form_is_refused(
    change: Callable[[dict[str, Any]], object], reason: str, required: bool, pair: KeyPair, envelope: bytes
) -> None:
    content = json.loads(envelope)
    change(content)
    trusted = public_keys(pair.public) if required else None
    with pytest.raises(SignatureError, match=reason):
        signer(MANIFEST, json.dumps(content).encode(), trusted)


def test_an_envelope_that_is_no_json_is_refused(envelope: bytes) -> None:
    for broken in (b"", envelope[:-1], b"[" * 9000, envelope.replace(b'"payload":', b'"payload":"", "payload":')):
        with pytest.raises(BundleError):
            signer(MANIFEST, broken, None)
