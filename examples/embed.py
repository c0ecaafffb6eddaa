"""The smallest program around an engine: `python embed.py build/resnet18 photo.jpg`."""

import sys

from edgewright.runtime import Session

model, *photographs = sys.argv[1:]
with Session.open(model) as session:  # a build folder, a bundle or an engine file
    for photograph, (best, *_) in zip(photographs, session.classify(photographs)):
        print(f"{photograph}: {best.label} ({100 * best.probability:.1f} %)")
