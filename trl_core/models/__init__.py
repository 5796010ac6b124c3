"""Models: loading, log-probabilities, reference models."""
