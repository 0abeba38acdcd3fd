"""Measuring a model: log-likelihoods, multiple choice, perplexity, executed layers and their cost."""
