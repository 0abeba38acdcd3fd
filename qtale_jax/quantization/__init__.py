"""Weight quantization: rounding cores, storage formats, the one linear that knows them, the pipeline over a model."""
