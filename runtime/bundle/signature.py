"""A DSSE envelope (version 1, https://github.com/secure-systems-lab/dsse) over the exact bytes of the manifest.

It is verified before the manifest is parsed. Stricter than DSSE asks for: `keyid` is the key's fingerprint and not a
hint, and fields that DSSE does not know are refused.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any

from ..errors import SignatureError
from .keys import PrivateKey, PublicKey
from .manifest import ENVELOPE_FILE, MOST_MANIFEST_BYTES, SHA256
from .strict_json import parsed

__all__ = ["MOST_ENVELOPE_BYTES", "PAYLOAD_TYPE", "pre_authentication_encoding", "signed_envelope", "signer"]

PAYLOAD_TYPE = "application/vnd.edgewright.bundle+json"
MOST_SIGNATURES = 16
MOST_ENVELOPE_BYTES = 4 * -(-MOST_MANIFEST_BYTES // 3) + (4 << 10)  # base64 of the largest manifest, and signatures
SIGNATURE_BYTES = 64  # RFC 8032, section 5.1.6
UNFIT = "copy the bundle again as it was signed"


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """What is signed: "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body (DSSE protocol, "Signature Definition")."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def signed_envelope(manifest: bytes, key: PrivateKey) -> bytes:
    """The envelope as JSON; the same bytes for the same manifest and key."""
    signature = key.signature(pre_authentication_encoding(PAYLOAD_TYPE, manifest))
    content = {
        "payload": base64.b64encode(manifest).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": key.fingerprint, "sig": base64.b64encode(signature).decode()}],
    }
    return json.dumps(content, separators=(",", ":")).encode()


def signer(manifest: bytes, envelope: bytes | None, trusted: Sequence[PublicKey] | None) -> str | None:
    """Fingerprint of the trusted key that signed the manifest; None if no key is asked for (`trusted` is None).

    An envelope has to be one for this manifest even then. Raises `SignatureError`.
    """
    if envelope is None:
        if trusted is not None:
            raise SignatureError("the bundle is not signed, and a signature is required", "pack it with --sign KEY")
        return None
    signatures = _signatures(manifest, envelope)
    if trusted is None:
        return None
    message = pre_authentication_encoding(PAYLOAD_TYPE, manifest)
    for key in trusted:
        if key.fingerprint in signatures and key.fits(signatures[key.fingerprint], message):
            return key.fingerprint
    known = ", ".join(key.fingerprint[:16] for key in trusted)
    signed_by = ", ".join(fingerprint[:16] for fingerprint in signatures)
    if not {key.fingerprint for key in trusted} & signatures.keys():
        raise SignatureError(f"the bundle is signed by {signed_by}, trusted here is {known}", "sign it with that key")
    raise SignatureError(f"the signature by {signed_by} does not fit the bundle", UNFIT)


def _signatures(manifest: bytes, envelope: bytes) -> dict[str, bytes]:
    """The signatures by the fingerprints of their keys."""
    content = parsed(envelope, ENVELOPE_FILE)
    if content.keys() != {"payload", "payloadType", "signatures"}:
        raise _broken(f"has the fields {', '.join(sorted(content))[:80]}")
    if content["payloadType"] != PAYLOAD_TYPE:
        raise _broken(f"is for another type, expected {PAYLOAD_TYPE}")
    if content["payload"] != base64.b64encode(manifest).decode():
        raise SignatureError("the signature is for another manifest than the bundle's", UNFIT)
    listed = content["signatures"]
    if not isinstance(listed, list) or not 1 <= len(listed) <= MOST_SIGNATURES:
        raise _broken(f"has no list of 1 to {MOST_SIGNATURES} signatures")
    signatures = dict(map(_signature, listed))
    if len(signatures) != len(listed):
        raise _broken("has two signatures by one key")
    return signatures


def _signature(entry: Any) -> tuple[str, bytes]:
    if not isinstance(entry, dict) or entry.keys() != {"keyid", "sig"}:
        raise _broken("has a signature without keyid and sig, or with more")
    fingerprint, encoded = entry["keyid"], entry["sig"]
    if not isinstance(fingerprint, str) or not SHA256.fullmatch(fingerprint):
        raise _broken("has a keyid that is no SHA-256")
    try:
        signature = base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError, ValueError):
        signature = b""
    if len(signature) != SIGNATURE_BYTES or base64.b64encode(signature).decode() != encoded:
        raise _broken(f"has a signature that is not {SIGNATURE_BYTES} bytes in base64")
    return fingerprint, signature


def _broken(words: str) -> SignatureError:
    return SignatureError(f"{ENVELOPE_FILE} {words}", UNFIT)
