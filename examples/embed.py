"""The smallest program around an engine: `python embed.py build/resnet18 photo.jpg`."""

import sys

from edgewright.runtime import Session

with Session.open(sys.argv[1]) as session:  # a build folder, a bundle or an engine file
    for predictions in session.classify(sys.argv[2:]):
        best = predictions[0]
        print(f"{best.label} ({100 * best.probability:.1f} %)")
