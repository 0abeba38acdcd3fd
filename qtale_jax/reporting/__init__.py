"""From evaluation files and training logs to tables, plots and one page. Nothing here needs JAX."""
