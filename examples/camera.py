"""Classifies frames as they come: from a camera, a video file, or a folder of images.

    python camera.py model.edgewright --require-signature release.pub          # the first camera
    python camera.py build/mobilenet_effnet_b0/mobilenet_effnet_b0.bundle clip.mp4
    python camera.py build/resnet18 photographs/

Two frames are under way at a time: while the engine works on one, the next is read and preprocessed. Camera and video
need OpenCV (`pip install opencv-python-headless`); a folder needs Pillow alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgewright.runtime import EdgewrightError, Prediction, Session

IN_FLIGHT = 2
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def frames(source: str) -> Iterator[tuple[str, Any]]:
    """Names and images: paths of a folder, or RGB arrays uint8 [H, W, 3] of a video file or a camera's number."""
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise EdgewrightError(f"there are no images in {source}", f"it reads {', '.join(SUFFIXES)}")
        yield from ((file.name, file) for file in files)
        return
    if not source.isdecimal() and not path.exists():
        raise EdgewrightError(f"there is no {source}", "give a camera's number, a video file or a folder of images")
    yield from _captured(source)


def _captured(source: str) -> Iterator[tuple[str, Any]]:
    try:
        import cv2
    except ImportError:
        raise EdgewrightError(
            "OpenCV is not installed, which reads cameras and videos", "pip install opencv-python-headless"
        ) from None
    capture = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    try:
        if not capture.isOpened():
            raise EdgewrightError(f"cannot open {source}", "is it a camera or a video, and free?")
        number = 0
        while (read := capture.read())[0]:
            yield f"frame {number}", cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)  # OpenCV gives blue first
            number += 1
    finally:
        capture.release()


def classified(session: Session, source: str) -> Iterator[tuple[str, Prediction]]:
    """The best class of each frame, in order."""
    waiting: deque[str] = deque()
    for name, frame in frames(source):
        if len(waiting) == IN_FLIGHT:
            yield waiting.popleft(), session.predictions(session.result(), top=1)[0][0]
        session.submit(session.preprocess([frame]))
        waiting.append(name)
    while waiting:
        yield waiting.popleft(), session.predictions(session.result(), top=1)[0][0]


def main() -> int:
    """Prints a line per frame, and at the end how fast it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a build folder, a bundle or an engine file")
    parser.add_argument("source", nargs="?", default="0", help="a camera's number, a video file or a folder")
    parser.add_argument("--require-signature", type=Path, metavar="KEYFILE")
    arguments = parser.parse_args()
    try:
        with Session.open(arguments.model, require_signature=arguments.require_signature) as session:
            print(f"engine: {session.why}", file=sys.stderr)
            began, count = time.perf_counter(), 0
            for name, best in classified(session, arguments.source):
                print(f"{name}\t{best.label}\t{best.probability:.3f}", flush=True)
                count += 1
            seconds = time.perf_counter() - began
            print(f"{count} frames, {count / seconds:.1f} a second", file=sys.stderr)
    except EdgewrightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
