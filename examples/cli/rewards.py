"""Rewards for the example of `trl-core train`."""


def digits(completions, **_):
    """Share of the characters that are digits: a signal that even an untrained model gives."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def brief(completions, max_chars=None, **_):
    """1 for completions of at most `max_chars` characters, a column of the dataset; None where it is not set."""
    limits = max_chars or [None] * len(completions)
    return [
        None if limit is None else float(len(text) <= limit) for text, limit in zip(completions, limits, strict=True)
    ]
