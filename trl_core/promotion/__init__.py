"""From experimental to stable and back: criteria, their evidence, and moving the one line of `pyproject.toml`."""
