"""What a distribution promises: a record of its interface per release, and what changed since.

Authors' tools, behind `trl-core api`; no run imports them. A record is a plain dictionary, see `record`.
"""

from .compare import Change, additions, breaking_changes, changes, notices
from .record import check, minors_unchanged, record, records, write

__all__ = [
    "Change",
    "additions",
    "breaking_changes",
    "changes",
    "check",
    "minors_unchanged",
    "notices",
    "record",
    "records",
    "write",
]
