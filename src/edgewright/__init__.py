"""Edgewright."""
