"""Whether images are resized here as they were where the bundle was packed."""

from __future__ import annotations

import PIL

from ..bundle import Bundle

__all__ = ["resize_warning"]


def resize_warning(bundle: Bundle) -> str:
    """A sentence if this Pillow resizes otherwise than the one that the bundle's accuracy was measured with, else "".

    The golden inputs do not show that: they are resized already.
    """
    if bundle.spec.preprocess.fingerprint() == bundle.spec.resized:
        return ""
    packed = bundle.tools.get("pillow", "of another version")
    return (
        f"Pillow {PIL.__version__} resizes images otherwise than Pillow {packed}, with which the bundle was packed and "
        f"its accuracy measured; pip install pillow=={packed}"
    )
