"""The deployable bundle and its predictor."""
