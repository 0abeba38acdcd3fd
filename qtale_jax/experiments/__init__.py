"""A grid of stages: what has to run, in which order, in which processes."""
