"""Training: objective, optimizer, step, loop, checkpoints, logs."""
