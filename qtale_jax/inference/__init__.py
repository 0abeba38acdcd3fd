"""Running a model: policies from specifications, sampling, generation."""
