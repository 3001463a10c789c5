"""Logs of services: one line a record, on standard error.

    2026-01-31T12:00:00.123Z info kvfs_metadata.service: text

Line breaks in texts and tracebacks are written as ``\\n``, so that a record is always one line.
``KVFS_LOG`` sets the level, for all (``KVFS_LOG=debug``) or by package
(``KVFS_LOG=info,kvfs_datapath=debug``).
"""

from __future__ import annotations

import datetime
import logging
import logging.handlers
import os
import sys
from pathlib import Path

from kvfs_base.errors import InvalidRequest

VARIABLE = "KVFS_LOG"
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class LineFormatter(logging.Formatter):
    """Raises nothing, whatever a record holds."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        text = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        stamp = when.strftime("%Y-%m-%dT%H:%M:%S.") + f"{when.microsecond // 1000:03d}Z"
        return f"{stamp} {record.levelname.lower()} {record.name}: {text}"


def parse_levels(text: str) -> dict[str, int]:
    """Level by logger name; "" is everybody else. Raises InvalidRequest."""
    levels = {"": logging.INFO}
    for part in filter(None, text.split(",")):
        name, _, level = part.rpartition("=")
        if level.lower() not in LEVELS:
            raise InvalidRequest(
                detail=f"{VARIABLE}: no such level: {level!r} ({', '.join(LEVELS)})"
            )
        levels[name] = LEVELS[level.lower()]
    return levels


def set_up(path: Path | None = None, limit: int = 0) -> None:
    """Logs to standard error, or to ``path`` and one older file, each of at most ``limit`` bytes.
    Raises InvalidRequest for a wrong KVFS_LOG."""
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=limit, backupCount=1)
    handler.setFormatter(LineFormatter())
    logging.getLogger().addHandler(handler)
    for name, level in parse_levels(os.environ.get(VARIABLE, "")).items():
        logging.getLogger(name).setLevel(level)
