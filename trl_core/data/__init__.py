"""Datasets: formats, rendering, checks, tokenisation and packing. The functions TRL's users know are found here."""

from .formats import maybe_convert_to_chatml, maybe_extract_prompt, maybe_unpair_preference_dataset
from .loading import load_mixture
from .packing import pack_dataset
from .prompts import is_conversational

__all__ = [
    "is_conversational",
    "load_mixture",
    "maybe_convert_to_chatml",
    "maybe_extract_prompt",
    "maybe_unpair_preference_dataset",
    "pack_dataset",
]
