"""Versions of installed packages, without importing them."""

from __future__ import annotations

__all__ = ["installed_version", "two_onnxruntimes"]


def installed_version(*distributions: str) -> str | None:
    """Of the first of those distributions that is installed; None if there is no record of any."""
    from importlib import metadata  # takes 25 ms and 3 MB, and most sessions never ask

    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def two_onnxruntimes() -> bool:
    """Whether onnxruntime and onnxruntime-gpu are both installed: into one folder, over each other."""
    return all(installed_version(name) for name in ("onnxruntime", "onnxruntime-gpu"))
