"""Pallas kernels by device, each with the plain JAX that it replaces: same arguments, same numbers.

They are chosen by `ModelSpecification.kernels`, and do what fits them; what does not goes to the plain form.
"""
