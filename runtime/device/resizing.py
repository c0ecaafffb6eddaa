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
    packed = bundle.tools.get("pillow", PIL.__version__)
    same = packed == PIL.__version__  # in another build, or on another processor
    there, remedy = ("the one", "") if same else (f"Pillow {packed},", f"; pip install pillow=={packed}")
    return (
        f"Pillow {PIL.__version__} resizes images otherwise than {there} with which the bundle was packed and its "
        f"accuracy measured{remedy}"
    )
