"""Finding the threshold theta on calibration data, without any training."""
