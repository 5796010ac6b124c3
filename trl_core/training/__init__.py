"""The training loop on `transformers.Trainer`: configuration, state, metrics, base and online trainers."""
