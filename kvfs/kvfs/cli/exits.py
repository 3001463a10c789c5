"""Exit codes, and one line for each expected error that says what to do."""

from __future__ import annotations

import enum
import errno
import os

from kvfs_base.errors import (
    AlreadyRunning,
    AuthenticationFailed,
    BackupDamaged,
    CapacityError,
    Conflict,
    ConnectionLost,
    DeadlineExceeded,
    EntryNotFound,
    FuseMissing,
    IntegrityError,
    InvalidRequest,
    KvfsError,
    MountFailed,
    MountPointBusy,
    NoTarget,
    NotKvfsDirectory,
    NotRunning,
    RoleFailed,
    StoreUnavailable,
    TargetInUse,
    TargetRemoved,
    TargetUnknown,
    VersionMismatch,
)


class ExitCode(enum.IntEnum):
    """What the command ``kvfs`` exits with; docs/cli.md lists them for people."""

    OK = 0
    FAILED = 1
    """Any other error."""
    USAGE = 2
    """A wrong command line or setting."""
    NOT_KVFS = 3
    """The directory is not a kvfs directory."""
    VERSION = 4
    """Another format version."""
    ALREADY_RUNNING = 5
    NOT_RUNNING = 6
    MOUNT_BUSY = 7
    """The mount point is busy or cannot be used."""
    NO_FUSE = 8
    ADDRESS_IN_USE = 9
    """Somebody else listens on the port or socket."""
    ROLE_FAILED = 10
    """A process of `kvfs up` did not start, or (`kvfs status`) is not serving."""
    NOT_FOUND = 11
    """No such file or block."""
    UNREACHABLE = 12
    """A service does not answer."""
    NO_ROOM = 13
    DAMAGED = 14
    """The stored bytes are not what was written."""
    INCONSISTENT = 15
    """`kvfs fsck` found something that is not repaired."""
    REPAIRED = 16
    """`kvfs fsck` found something and repaired all of it."""
    IN_USE = 17
    """A target cannot be removed: something is left on it."""
    REFUSED = 18
    """A service and this command do not have the same secret."""
    BUG = 70
    """An error that should not happen; --debug shows where."""
    INTERRUPTED = 130


_CODES: list[tuple[type[BaseException], ExitCode]] = [
    (VersionMismatch, ExitCode.VERSION),
    (FuseMissing, ExitCode.NO_FUSE),
    (MountFailed, ExitCode.MOUNT_BUSY),
    (InvalidRequest, ExitCode.USAGE),
    (NotKvfsDirectory, ExitCode.NOT_KVFS),
    (AlreadyRunning, ExitCode.ALREADY_RUNNING),
    (NotRunning, ExitCode.NOT_RUNNING),
    (RoleFailed, ExitCode.ROLE_FAILED),
    (TargetInUse, ExitCode.IN_USE),
    (TargetUnknown, ExitCode.NOT_FOUND),
    (EntryNotFound, ExitCode.NOT_FOUND),
    (ConnectionLost, ExitCode.UNREACHABLE),
    (DeadlineExceeded, ExitCode.UNREACHABLE),
    (NoTarget, ExitCode.UNREACHABLE),
    (StoreUnavailable, ExitCode.UNREACHABLE),
    (AuthenticationFailed, ExitCode.REFUSED),
    (CapacityError, ExitCode.NO_ROOM),
    (IntegrityError, ExitCode.DAMAGED),
    (KvfsError, ExitCode.FAILED),
    (FileNotFoundError, ExitCode.NOT_FOUND),
    (OSError, ExitCode.FAILED),
]

_TELLING = {
    ExitCode.USAGE,
    ExitCode.VERSION,
    ExitCode.MOUNT_BUSY,
    ExitCode.NO_FUSE,
    ExitCode.ADDRESS_IN_USE,
    ExitCode.NO_ROOM,
}
"""Codes of a failed child that say more than ROLE_FAILED."""


def exit_for(error: BaseException) -> tuple[ExitCode, str]:
    """The exit code and the line to print for ``error``."""
    error = innermost(error)
    if isinstance(error, ConnectionLost) and error.detail == os.strerror(errno.EADDRINUSE):
        return ExitCode.ADDRESS_IN_USE, f"{error.address} is taken by another process"
    if isinstance(error, RoleFailed) and error.exit_code in _TELLING:
        return ExitCode(error.exit_code), explain(error)
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, explain(error)
    return ExitCode.BUG, f"this is a bug: {type(error).__name__}: {error} (--debug shows where)"


def innermost(error: BaseException) -> BaseException:
    """The error that a group holds; of several the first one that a person can understand."""
    while isinstance(error, BaseExceptionGroup):
        known = [e for e in error.exceptions if not isinstance(e, BaseExceptionGroup)]
        known.sort(key=lambda e: not isinstance(e, KvfsError | OSError))
        error = known[0] if known else error.exceptions[0]
    return error


def explain(error: BaseException) -> str:
    """One line: what is wrong, and what to do about it where that is known."""
    match error:
        case VersionMismatch():
            return (
                f"{error.detail}: format {error.found} is not this version's ({error.expected}): "
                "use the kvfs that made it"
            )
        case MountPointBusy():
            return f"mount point {error.mountpoint} is busy: {error.detail}"
        case FuseMissing():
            return f"cannot mount: {error.detail}"
        case MountFailed():
            return f"cannot mount at {error.mountpoint}: {error.detail}"
        case InvalidRequest():
            return error.detail or str(error)
        case NotKvfsDirectory():
            return (
                f"{error.path} is not a kvfs directory: {error.detail} "
                "(kvfs up makes one of a missing or empty directory)"
            )
        case AlreadyRunning():
            who = f" (pid {error.pid})" if error.pid else ""
            return f"{error.directory} is running already{who}; stop it with kvfs down"
        case NotRunning():
            return f"{error.directory} is not running; start it with kvfs up"
        case RoleFailed():
            how = f" (exit code {error.exit_code})" if error.exit_code else ""
            return f"{error.role} did not start{how}: {error.detail.removeprefix('kvfs: ')}"
        case TargetInUse():
            return (
                f"target {error.target_id} cannot be removed: {error.detail} ({error.blocks} "
                f"blocks, {error.files} files, {error.removals} chunks to remove): drain it and "
                "wait, or lose them with --force"
            )
        case TargetRemoved():
            return (
                f"target {error.uuid} was removed from the cluster: kvfs cluster add lets it come "
                "back"
            )
        case TargetUnknown():
            return (
                f"no such target or chunk server: {error.name} (kvfs cluster targets lists them; "
                "a new one registers when kvfs serve chunks starts it)"
            )
        case EntryNotFound():
            name = error.name.decode(errors="replace") if isinstance(
                error.name, bytes) else error.name  # fmt: skip
            return f"no such file or block: {name}"
        case ConnectionLost():
            return f"cannot reach {error.address}: {error.detail}; is kvfs running there?"
        case AuthenticationFailed():
            where = f"{error.address}: " if error.address else ""
            return f"{where}{error.detail}: give --secret-file the file that the servers have"
        case StoreUnavailable():
            return f"the metadata store cannot be reached: {error.detail}"
        case BackupDamaged():
            return f"{error.path} is damaged at byte {error.offset}: {error.detail}"
        case Conflict():
            return error.detail or str(error)
        case KvfsError():
            return str(error)
        case OSError() if error.filename is not None:
            return f"{os.fsdecode(error.filename)}: {error.strerror}"
        case _:
            return str(error)
