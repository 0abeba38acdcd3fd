"""Continuous batching: requests share a batch of fixed shape, and join and leave it between chunks of tokens."""
