"""Seeded corruptions of a bundle in both of its forms, and what becomes of those who open them."""

from __future__ import annotations

import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from edgewright.runtime.bundle import open_bundle, unpack, write_archive
from edgewright.runtime.bundle.manifest import MANIFEST_FILE
from edgewright.runtime.errors import BundleError

__all__ = ["Attack", "attacked", "corrupted_archive", "corrupted_folder"]


@dataclass
class Attack:
    """What became of corrupted bundles.

    * accepted: the corruptions that were not noticed; uncaught: those that raised anything but a `BundleError`
    * slowest: seconds of the slowest refusal
    """

    accepted: list[str] = field(default_factory=list)
    uncaught: list[str] = field(default_factory=list)
    slowest: float = 0.0
    refused: int = 0


def attacked(bundle: Path, scratch: Path, count: int, seed: int, *, require_signature: Path | None = None) -> Attack:
    """Opens `count` corrupted copies of `bundle`, half of them folders and half of them archives."""
    rng, attack = random.Random(seed), Attack()
    archive = scratch / "whole.edgewright"
    write_archive(bundle, archive)
    content = archive.read_bytes()
    for number in range(count):
        copy = scratch / f"{number}.bundle"
        if number % 2:
            kind, damaged = corrupted_archive(content, rng)
            copy.write_bytes(damaged)
            unpacked = scratch / f"{number}.unpacked"
            _try(attack, f"{number}: {kind}", partial(unpack, copy, unpacked, require_signature=require_signature))
            if unpacked.exists():
                shutil.rmtree(unpacked)
            copy.unlink()
        else:
            shutil.copytree(bundle, copy)
            kind = corrupted_folder(copy, rng)
            _try(attack, f"{number}: {kind}", partial(_open, copy, require_signature))
            shutil.rmtree(copy)
    return attack


def _open(bundle: Path, require_signature: Path | None) -> None:
    open_bundle(bundle, require_signature=require_signature).close()


def _try(attack: Attack, name: str, opening: Callable[[], object]) -> None:
    began = time.perf_counter()
    try:
        opening()
        attack.accepted.append(name)
    except BundleError:
        attack.refused += 1
    except Exception as error:
        attack.uncaught.append(f"{name}: {error!r}")
    attack.slowest = max(attack.slowest, time.perf_counter() - began)


def corrupted_folder(folder: Path, rng: random.Random) -> str:
    """Damages a bundle's folder in one way, and says in which."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    name = path.relative_to(folder).as_posix()
    kind = rng.choice(("flip", "cut", "grow", "rename", "remove", "swap", "add", "link", "pipe", "entries"))
    if kind == "rename":
        path.rename(path.with_name(rng.choice((path.name.upper(), f"{path.name}~", f"..{path.name}"))))
    elif kind == "remove":
        path.unlink()
    elif kind == "add":
        path.with_name(f"{rng.randrange(1000)}.onnx").write_bytes(rng.randbytes(rng.randrange(20)))
    elif kind == "link":
        path.rename(folder.parent / "aside")
        path.symlink_to(folder.parent / "aside")
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "swap":
        other = rng.choice([each for each in files if each.read_bytes() != path.read_bytes()])
        name = f"{name}, {other.relative_to(folder)}"
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
    elif kind == "entries":
        manifest = folder / MANIFEST_FILE
        manifest.write_bytes(_with_other_entries(manifest.read_bytes(), rng))
    else:
        path.write_bytes(_damaged(path.read_bytes(), kind, rng))
    return f"{kind} {name}"


def corrupted_archive(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """The archive damaged in one way, and in which."""
    manifest_size, envelope_size = struct.unpack_from("<II", content, 8)
    start, end = 16, 16 + manifest_size
    kind = rng.choice(("flip", "cut", "grow", "header", "sizes", "move", "entries", "strip"))
    if kind == "header":
        return kind, _damaged(content[:end], "flip", rng) + content[end:]
    if kind == "sizes":
        sizes = rng.choice(((0, 0), (2**32 - 1, envelope_size), (manifest_size, 2**32 - 1), (manifest_size - 1, 0)))
        return kind, content[:8] + struct.pack("<II", *sizes) + content[start:]
    if kind == "move":
        piece = rng.randrange(1, 2000)
        return kind, content[:-piece][:start] + content[-piece:] + content[start:-piece]
    if kind == "entries":
        return kind, content[:start] + _with_other_entries(content[start:end], rng) + content[end:]
    if kind == "strip":  # as if it had an envelope that it has not, or had none
        other = 0 if envelope_size else 1
        return kind, content[:8] + struct.pack("<II", manifest_size, other) + content[start:]
    return kind, _damaged(content, kind, rng)


def _damaged(content: bytes, kind: str, rng: random.Random) -> bytes:
    if kind == "cut" and content:
        return content[: rng.randrange(len(content))]
    if kind == "grow":
        return content + rng.randbytes(rng.randrange(1, 50))
    damaged = bytearray(content or b"\0")
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged) if content else b"\1"


def _with_other_entries(manifest: bytes, rng: random.Random) -> bytes:
    """The lines of two files exchanged, or letters of a path."""
    lines = manifest.split(b"\n")
    paths = [index for index, line in enumerate(lines) if b'"path"' in line]
    first, second = rng.sample(paths, 2)
    if rng.random() < 0.5:
        lines[first], lines[second] = lines[second], lines[first]
    else:
        lines[first] = lines[first].replace(b"on", rng.choice((b"..", b"//", b"\\\\", b"ON", b"\xc3\xa4")), 1) + b" "
    return b"\n".join(lines)
