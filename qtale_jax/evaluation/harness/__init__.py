"""lm-evaluation-harness on our models: the adapter, tasks from local files, what each task executed."""
