"""Kernels for NVIDIA GPUs (Pallas on Triton), from compute capability 8.0 on.

JAX 0.11 calls this backend deprecated in favour of Mosaic GPU, whose matrix products start at 64 rows and at Hopper.
What decode needs is a handful of rows. On a single GPU these kernels are the default, see `kernels.choice`.
"""
