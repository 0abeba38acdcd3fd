"""Kernels for TPUs (Pallas on Mosaic)."""
