"""The command ``kvfs``.

Each command's module is imported when the command runs, so that `kvfs --help` and short commands
do not pay for the services. Commands of other packages come in through the entry point group
``kvfs.commands``.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

from kvfs.cli.exits import ExitCode, exit_for, innermost

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

COMMANDS = {
    "up": ("kvfs.cli.cluster:up", "Start a whole kvfs on this machine."),
    "down": ("kvfs.cli.cluster:down", "Stop it."),
    "status": ("kvfs.cli.status:status", "Show what runs and what is stored."),
    "fsck": ("kvfs.cli.fsck:fsck", "Compare metadata with chunk servers, and repair."),
    "mount": ("kvfs.cli.serve:mount", "Mount a kvfs that runs."),
    "serve": ("kvfs.cli.serve:serve", "Start one role."),
    "ls": ("kvfs.cli.files:ls", "List a directory."),
    "cat": ("kvfs.cli.files:cat", "Write files and blocks to standard output."),
    "put": ("kvfs.cli.files:put", "Store a file or a block."),
    "get": ("kvfs.cli.files:get", "Fetch a file or a block."),
    "rm": ("kvfs.cli.files:rm", "Remove files, blocks and empty directories."),
    "stat": ("kvfs.cli.files:stat_", "Show the attributes of a file or a block."),
    "copies": ("kvfs.cli.copies:copies", "Say how many copies a directory wants."),
    "quota": ("kvfs.cli.quota:quota", "Bound what may lie below a directory."),
    "cluster": ("kvfs.cli.administration:cluster", "Look after servers and disks."),
    "metadata": ("kvfs.cli.metadata:metadata", "Back up, restore, copy, inspect the metadata."),
    "secret": ("kvfs.cli.secret:secret", "Make the secret of a cluster."),
    "version": ("kvfs.cli.version:version", "Show versions."),
}

ENTRY_POINTS = "kvfs.commands"


class Commands(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *sorted(set(_entry_points()) - set(COMMANDS))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            module, _, name = COMMANDS[cmd_name][0].partition(":")
            command: Any = getattr(importlib.import_module(module), name)
        else:
            entry_point = _entry_points().get(cmd_name)
            if entry_point is None:
                return None
            command = entry_point.load()
        if not isinstance(command, click.Command):
            raise click.ClickException(f"the command {cmd_name} is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Help texts without importing our own commands."""
        rows = [(name, text) for name, (_, text) in COMMANDS.items()]
        for name in self.list_commands(ctx)[len(COMMANDS) :]:
            try:
                command = self.get_command(ctx, name)
            except ImportError as exc:
                rows.append((name, f"(not available: {exc})"))
            else:
                assert command is not None
                rows.append((name, command.get_short_help_str()))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # 40 ms that our own commands do not need

    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
def cli(debug: bool) -> None:
    """A parallel file system that is a KV cache for LLM inference.

    `kvfs up DIR --mount MNT` starts one, `kvfs down DIR` stops it.
    """


def main() -> NoReturn:
    """Runs the command line; ends the process with one of ExitCode."""
    debug = "--debug" in sys.argv[1:]
    if not debug:
        # Without a handler Python prints warnings itself; services set up handlers of their own.
        logging.getLogger().addHandler(logging.NullHandler())
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        result = cli.main(arguments, prog_name="kvfs", standalone_mode=False)
    except click.exceptions.Exit as exc:
        sys.exit(exc.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(ExitCode.INTERRUPTED)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except BaseException as exc:
        if isinstance(innermost(exc), BrokenPipeError):
            # The reader of our output has seen enough; flushing at exit would say so again.
            sys.stdout = None
            sys.exit(ExitCode.OK)
        if debug or isinstance(exc, SystemExit):
            raise
        code, text = exit_for(exc)
        print(f"kvfs: {text}", file=sys.stderr)
        sys.exit(code)
    sys.exit(result if isinstance(result, int) else ExitCode.OK)
