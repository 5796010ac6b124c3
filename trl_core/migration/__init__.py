"""From TRL to here: where its names are, and the rewriting of scripts (`trl-core migrate`).

`names` holds the table and needs nothing; `rewrite` and `files` need libcst (the extra `migrate`).
"""

from .names import look_up, table, table_of_homeless

__all__ = ["look_up", "table", "table_of_homeless"]
