"""Comparing what the metadata says with what the chunk servers have, and repairing it.

``check`` is the whole check as one function, for stores and targets that stand still; ``Fsck`` runs
it against services at work or against their directories, looks twice, and repairs.
"""

from kvfs.fsck.compare import check
from kvfs.fsck.run import Fsck, Outcome, Report, State
from kvfs.fsck.sources import offline, online

__all__ = ["Fsck", "Outcome", "Report", "State", "check", "offline", "online"]
