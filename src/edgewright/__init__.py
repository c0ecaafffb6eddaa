"""Takes a PyTorch image classifier to an edge device and proves its accuracy there.

On a device: `from edgewright.runtime import Session`. On a workstation: `edgewright.pipeline.Pipeline`.
"""
