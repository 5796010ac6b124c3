"""For authors of algorithms: recorded rollouts, a tiny model and tokenizer, and the conformance checks."""

from .models import tiny_model, tiny_tokenizer
from .rollouts import FixedRollouts

__all__ = ["FixedRollouts", "tiny_model", "tiny_tokenizer"]
