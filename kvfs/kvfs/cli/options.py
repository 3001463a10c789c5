"""Command line options made of settings dataclasses, and options that commands share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from kvfs import settings
from kvfs_base.errors import InvalidRequest

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def size_option(*names: str, help: str) -> Callable[[F], F]:
    """An option whose value is a size such as ``10G``; see settings.parse_size."""

    def parse(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
        try:
            return None if value is None else settings.parse_size(value)
        except ValueError as exc:
            raise click.BadParameter(str(exc), ctx, param) from exc

    return click.option(*names, metavar="SIZE", callback=parse, help=help)


config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file of settings, as kvfs.toml.",
)


def setting_options(cls: type, section: str, *, skip: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Adds one option for each setting of ``cls``; values arrive as text under their names."""

    def add(function: F) -> F:
        for setting in reversed(settings.settings_of(cls, section)):
            if setting.name in skip:
                continue
            name = setting.flag
            if setting.kind == "switch":
                name = f"{setting.flag}/--no-{setting.flag.removeprefix('--')}"
            function = click.option(
                name,
                setting.name,
                default=None,
                is_flag=True if setting.kind == "switch" else None,
                metavar=None if setting.kind == "switch" else setting.kind.upper(),
                help=_help(setting),
            )(function)
        return function

    return add


def _help(setting: settings.Setting) -> str:
    parts = [setting.description] if setting.description else []
    if setting.required:
        parts.append("[required]")
    elif setting.default is not None:
        shown = setting.default
        if setting.kind == "size":
            shown = settings.format_size(setting.default)
        parts.append(f"[default: {shown}]")
    return " ".join(parts)


def load_settings(
    cls: type[T], section: str, flags: Mapping[str, Any], config_path: Path | None
) -> T:
    """Settings from the file, if there is one, the environment and ``flags``."""
    file = {}
    if config_path is not None:
        file = settings.read_file(read_text(config_path), str(config_path))
    return settings.load(cls, section, file=file, environment=os.environ, flags=flags)


def read_text(path: Path) -> str:
    """Raises InvalidRequest if it is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidRequest(detail=f"{path}: not UTF-8 text: {exc}") from exc
