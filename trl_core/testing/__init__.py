"""For authors of algorithms: recorded rollouts, a tiny model and tokenizer, and the conformance kit."""

from .kit import conformance, conformance_checks
from .models import tiny_classifier, tiny_model, tiny_tokenizer
from .rollouts import FixedRollouts
from .subject import Subject

__all__ = [
    "FixedRollouts",
    "Subject",
    "conformance",
    "conformance_checks",
    "tiny_classifier",
    "tiny_model",
    "tiny_tokenizer",
]
