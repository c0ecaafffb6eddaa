"""On the device: engines that are built from a bundle, proven, and kept."""
