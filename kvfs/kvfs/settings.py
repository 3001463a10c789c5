"""Settings from DIR/kvfs.toml, the environment and flags, in that order of rising precedence.

Each service has one frozen dataclass with its settings; this module fills it. A setting ``key`` of
section ``metadata`` is ``key = ...`` under ``[metadata]`` in the file, ``KVFS_METADATA_KEY`` in the
environment and ``--key`` on the command line (with dashes). Sizes are bytes or text such as
``10G`` and ``512MiB``; ``K``, ``M``, ``G``, ``T`` count in powers of 1024.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from kvfs_base.errors import InvalidRequest
from kvfs_base.types import Address

T = TypeVar("T")

SECTIONS = ("up", "metadata", "chunks", "agent", "mount")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?B)?", re.IGNORECASE)
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


def parse_size(text: str) -> int:
    """``"10G"``, ``"512MiB"``, ``"1.5T"``, ``"4096"`` to bytes. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a size: {text!r} (such as 4096, 512MiB or 10G)")
    number, unit, _ = match.groups()
    return int(float(number) * 1024 ** " KMGTP".index(unit.upper() or " "))


def format_size(count: int) -> str:
    """Bytes for people: ``"1.5 GiB"``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass, as people see it."""

    section: str
    name: str
    hint: Any
    required: bool
    default: Any
    description: str

    @property
    def variable(self) -> str:
        return f"KVFS_{self.section}_{self.name}".upper()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def kind(self) -> str:
        """What its values are, in one word."""
        base = _without_none(self.hint)
        if typing.get_origin(base) is tuple:
            return "addresses" if typing.get_args(base)[0] is Address else "list"
        if base is int:
            return "size" if "_bytes" in self.name else "number"
        return {float: "number", bool: "switch", Address: "address"}.get(base, "text")


def settings_of(cls: type, section: str) -> list[Setting]:
    """The settings of a dataclass, in order. What may be None and has no default is None."""
    hints = typing.get_type_hints(cls)
    descriptions = _field_docstrings(cls)
    return [
        Setting(
            section=section,
            name=field.name,
            hint=hints[field.name],
            required=field.default is dataclasses.MISSING
            and type(None) not in typing.get_args(hints[field.name]),
            default=None if field.default is dataclasses.MISSING else field.default,
            description=descriptions.get(field.name, ""),
        )
        for field in dataclasses.fields(cls)
    ]


def read_file(text: str, where: str) -> dict[str, dict[str, Any]]:
    """Sections of a kvfs.toml. Raises InvalidRequest that names the line or the section."""
    try:
        sections = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise InvalidRequest(detail=f"{where}: {exc}") from exc
    for name, section in sections.items():
        if name not in SECTIONS or not isinstance(section, dict):
            raise InvalidRequest(
                detail=f"{where}: no such section: {name} (there are {', '.join(SECTIONS)})"
            )
    return sections


def load(
    cls: type[T],
    section: str,
    *,
    file: Mapping[str, Mapping[str, Any]] | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> T:
    """Fills ``cls``. ``flags`` that are None were not given. Raises InvalidRequest that names the
    key, the variable or the flag which is wrong, unknown or missing."""
    known = {s.name: s for s in settings_of(cls, section)}
    values: dict[str, Any] = {}
    for name, value, where in _sources(section, file or {}, environment or {}, flags or {}):
        setting = known.get(name)
        if setting is None:
            raise InvalidRequest(detail=f"{where}: no such setting")
        try:
            values[name] = convert(setting.hint, value, size=setting.kind == "size")
        except ValueError as exc:
            reason = exc.detail if isinstance(exc, InvalidRequest) else str(exc)
            raise InvalidRequest(detail=f"{where}: {reason}") from exc
    for setting in known.values():
        if setting.required and setting.name not in values:
            raise InvalidRequest(
                detail=f"{section}.{setting.name} is not set: give {setting.flag} or "
                f"{setting.variable}, or put it under [{section}] in kvfs.toml"
            )
        values.setdefault(setting.name, setting.default)
    return cls(**values)


def _sources(
    section: str,
    file: Mapping[str, Mapping[str, Any]],
    environment: Mapping[str, str],
    flags: Mapping[str, Any],
) -> Iterator[tuple[str, Any, str]]:
    """(setting, value, name for errors) of all sources, the weakest first."""
    for name, value in file.get(section, {}).items():
        yield name, value, f"kvfs.toml: {section}.{name}"
    prefix = f"KVFS_{section}_".upper()
    for variable, text in environment.items():
        if variable.startswith(prefix):
            yield variable.removeprefix(prefix).lower(), text, variable
    for name, value in flags.items():
        if value is not None:
            yield name, value, "--" + name.replace("_", "-")


def convert(hint: Any, value: Any, *, size: bool = False) -> Any:
    """``value`` (text, or what TOML holds) as a value of type ``hint``. Raises ValueError."""
    if type(None) in typing.get_args(hint):
        if value is None or value in ("", "none"):
            return None
        hint = _without_none(hint)
    if typing.get_origin(hint) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, Sequence):
            raise ValueError(f"not a list: {value!r}")
        return tuple(convert(typing.get_args(hint)[0], part) for part in parts)
    if isinstance(value, str):
        return _from_text(hint, value, size)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{value!r} is not a {getattr(hint, '__name__', hint)}")
    return value


def _from_text(hint: Any, text: str, size: bool) -> Any:
    if hint is str:
        return text
    if hint is Address:
        return Address.parse(text)
    if hint is bool:
        if text.lower() not in _TRUE | _FALSE:
            raise ValueError(f"neither true nor false: {text!r}")
        return text.lower() in _TRUE
    if hint is int and size:
        return parse_size(text)
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"not a number: {text!r}") from None
    raise ValueError(f"cannot be set from text: {hint}")


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        rest = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return hint


def _field_docstrings(cls: type) -> dict[str, str]:
    """The strings that stand below fields; Python does not keep them, the source does."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:
        return {}
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    found: dict[str, str] = {}
    for field, text in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            found[field.target.id] = " ".join(text.value.value.split())
    return found
