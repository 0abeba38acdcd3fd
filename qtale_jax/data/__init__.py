"""From files and generators to batches of tokens: sources, tokenisation, rows, the Grain pipeline."""
