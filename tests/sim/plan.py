"""What a seed makes of a world: how large it is, what it keeps, and what may go wrong in it."""

from __future__ import annotations

import dataclasses
import random

from sim.disk import DiskKnobs
from sim.network import NetworkKnobs

HARMLESS = ("kill metadata", "kill client", "pause", "clock")
NETWORK = ("partition", "one way", "isolate", "estrange", "clog", "break")
NEVER = 1e9
LIVENESS_SECONDS = 120.0
"""For what is to come by itself once all faults are healed."""


@dataclasses.dataclass
class Plan:
    """What a seed makes of the world."""

    kind: str
    metadata_servers: int
    chunk_servers: int
    targets: int
    clients: int
    durability: str
    copies: int
    faults: tuple[str, ...]
    lossy: bool
    """Acknowledged blocks may be lost, as misses: never their bytes mixed up."""
    evicts: bool
    """Blocks may vanish: a full disk makes the cache evict."""
    files: bool
    """Files are compared with linearizable registers."""
    files_lossy: bool
    """What was written to a file may be lost: nobody had synced it."""
    late_writes: bool
    """A write may arrive after its removal, and stays on the disk until it is found as garbage."""
    seconds: float
    fault_seconds: float
    outage_seconds: float
    pause_seconds: float
    late_seconds: float
    garbage_seconds: float
    """Between two rounds of looking for what nothing refers to. NEVER: every chunk must go by the
    order to remove it."""
    sync_rate: int
    """Bytes a second that bring members in step; 0 is no bound."""
    network: NetworkKnobs
    disk: DiskKnobs

    @property
    def ruins(self) -> bool:
        """All copies of a chunk may rot: whoever finds that writes it anew."""
        return self.kind == "chains and ruin"

    @property
    def drains(self) -> bool:
        return self.kind in DRAINING

    @property
    def leases_blocks(self) -> bool:
        return self.kind == BLOCK_LEASES

    @property
    def may_be_damaged(self) -> bool:
        """For a while nobody may have a good copy: the others are away. In the end somebody has."""
        return self.files_lossy or "rot" in self.faults


SINGLE_COPY = ("restarts", "network", "power", "anything")
CHAINS = (
    "chains",
    "leases",
    "chains and power",
    "chains and disks",
    "chains and rot",
    "chains and ruin",
    "chains and memory",
    "chains and changes",
)
KINDS = (*SINGLE_COPY, *CHAINS, *CHAINS, "chains and changes")
DRAINS = "drains"
CUTS = "drains and cuts"
BLOCK_LEASES = "block leases"
"""These three only when they are asked for. In the second, files become shorter and longer between
two looks at them; in the last, clients answer for blocks by themselves, as agents do."""
DRAINING = (DRAINS, CUTS)
FLIPPING = ("chains", "chains and rot", "chains and ruin")
"""Where bytes change on their way, for whole chunks and for pieces of files."""


def make_plan(rng: random.Random, kind: str = "") -> Plan:
    kind = kind or rng.choice(KINDS)
    durability = rng.choice(("cache", "strict"))
    copies = rng.choice((2, 2, 3)) if kind in CHAINS else 1
    lossy, files, lying = False, True, False
    faults: tuple[str, ...] = (*HARMLESS, "kill chunks")
    if kind == "network":
        faults, files = (*faults, *NETWORK), False
    elif kind == "power":
        durability, files = "strict", False
        faults = (*HARMLESS, *NETWORK, "power chunks", "power metadata", "full disk")
    elif kind == "anything":
        lossy, files, lying = True, False, True
        faults = (*HARMLESS, *NETWORK, "power all", "power metadata", "dead disk", "rot")
    elif kind == DRAINS:  # writes in place are not to come late
        files = rng.random() < 0.5
        more = () if files else (*NETWORK, "pause")
        harmless = tuple(fault for fault in HARMLESS if fault != "pause")
        faults = ("drain", "drain", "drain", *harmless, *more, "kill chunks")
    elif kind == CUTS:
        files = False
        faults = ("drain", "drain", "drain", "kill metadata", "kill client", "clock", "kill chunks")
    elif kind == BLOCK_LEASES:
        faults, files = (*faults, *NETWORK, "full disk"), False
    elif kind == "chains":
        faults = (*faults, *NETWORK, "behead")
    elif kind == "leases":
        faults = ("estrange", "estrange", "pause", "kill chunks", "partition")
    elif kind == "chains and memory":  # what the metadata service decided may be forgotten
        durability, lossy = "cache", True
        faults = ("power metadata", "estrange", "estrange", "kill chunks", "partition", "break")
    elif kind == "chains and power":
        durability = "strict"
        faults = (*faults, *NETWORK, "power chunks", "power metadata", "power all")
    elif kind == "chains and disks":
        faults = (*faults, *NETWORK, "dead disk", "full disk")
    elif kind == "chains and changes":
        # With wiped disks nobody may lose what another one has: no power is lost in "cache".
        faults = (*faults, *NETWORK, "take out", "take out", "wipe", "wipe", "behead")
        faults += ("power chunks", "power metadata") if durability == "strict" else ()
    elif kind == "chains and rot":  # and nobody else away: of two copies one may rot
        faults = ("rot", "rot", "kill client", "clock", "break", "kill metadata")
    elif kind == "chains and ruin":  # of some chunks no good copy is left
        lossy = True
        faults = ("rot", "rot", "kill chunks", "kill client", "break", "isolate")
    least = max(2, copies + (kind == "chains and changes"))
    chosen = tuple(f for f in faults if f == "drain" or rng.random() < 0.7) or faults[:1]
    return Plan(
        kind=kind,
        metadata_servers=1 if kind == BLOCK_LEASES else rng.choice((1, 1, 2)),
        chunk_servers=rng.randint(least, 4 if copies > 1 else 3),
        targets=1 if copies > 1 and rng.random() < 0.7 else rng.randint(1, 2),
        clients=rng.randint(2, 3),
        durability=durability,
        copies=copies,
        faults=chosen,
        lossy=lossy,
        evicts=lossy or "full disk" in chosen,
        files=files,
        files_lossy=copies == 1 and (lossy or "power chunks" in chosen),
        late_writes=not set(chosen) <= {"kill metadata", "clock", "kill chunks"},
        seconds=rng.uniform(9.0, 20.0),
        fault_seconds=rng.choice((0.7, 2.0, 4.0)) + 2.0 * (kind in DRAINING),
        outage_seconds=rng.choice((0.5, 2.0, 6.0)),
        pause_seconds=0.05 if kind == "leases" else rng.choice((0.05, 0.15, 0.4)),
        late_seconds=rng.choice((0.0, 1.0, 10.0)),
        garbage_seconds=NEVER if kind in ("restarts", *DRAINING) else rng.choice((2.0, 5.0)),
        sync_rate=20_000 if kind == "leases" else rng.choice((0, 0, 20_000)),
        network=NetworkKnobs(
            latency=rng.choice((0.0001, 0.001, 0.01)),
            slow_chance=0.0 if files and copies == 1 else rng.choice((0.0, 0.001, 0.02)),
            split_chance=rng.choice((0.0, 0.05, 0.3)),
            stop_chance=rng.choice((0.0, 0.0, 0.02)) if copies > 1 else 0.0,
            window_bytes=rng.choice((8 << 10, 128 << 10)),
            flip_chance=rng.choice((0.0, 0.05)) if lying or kind in FLIPPING else 0.0,
        ),
        disk=DiskKnobs(
            latency=rng.choice((0.0001, 0.001, 0.01)),
            stall_chance=rng.choice((0.0, 0.0005, 0.005)),
            lost_write_chance=rng.choice((0.0, 0.01)) if lying else 0.0,
            misdirected_chance=rng.choice((0.0, 0.01)) if lying else 0.0,
        ),
    )
