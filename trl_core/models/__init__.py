"""Models: loading, layouts, log-probabilities, reference models. What plugins may use is found here."""

from .loading import disable_dropout, load_classifier
from .logprobs import row_scores, token_values

__all__ = ["disable_dropout", "load_classifier", "row_scores", "token_values"]
