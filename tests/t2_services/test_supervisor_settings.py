"""Settings from file, environment and flags; exit codes; and that docs/ has all of them."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import kvfs.cli
from kvfs import settings
from kvfs.agent.config import AgentConfig
from kvfs.cli import exits, logs
from kvfs.cli.exits import ExitCode, exit_for
from kvfs.cli.targets import metadata_addresses
from kvfs.mount.config import MountConfig
from kvfs.settings import load, parse_size, read_file, settings_of
from kvfs.supervisor.config import UpConfig
from kvfs_base import errors
from kvfs_base.errors import InvalidRequest
from kvfs_base.types import Address
from kvfs_datapath.config import ChunkServerConfig
from kvfs_metadata.config import MetadataConfig

DOCS = Path(__file__).resolve().parents[2] / "docs"

CONFIGS: dict[str, type] = {
    "up": UpConfig,
    "metadata": MetadataConfig,
    "chunks": ChunkServerConfig,
    "agent": AgentConfig,
    "mount": MountConfig,
}


@dataclasses.dataclass(frozen=True)
class Example:
    name: str
    limit_bytes: int = 0
    ratio: float = 0.5
    fast: bool = False
    paths: tuple[str, ...] = ()
    address: Address | None = None
    servers: tuple[Address, ...] = ()


def problem(**sources: object) -> str:
    with pytest.raises(InvalidRequest) as caught:
        load(Example, "agent", **sources)  # type: ignore[arg-type]
    return caught.value.detail


def test_flags_beat_the_environment_which_beats_the_file() -> None:
    file = read_file('[agent]\nname = "file"\nlimit_bytes = "1K"\nratio = 1', "kvfs.toml")
    environment = {"KVFS_AGENT_NAME": "environment", "KVFS_AGENT_LIMIT_BYTES": "2K", "PATH": "/"}
    found = load(
        Example,
        "agent",
        file=file,
        environment=environment,
        flags={"name": "flag", "limit_bytes": None},
    )
    assert found == Example(name="flag", limit_bytes=2048, ratio=1.0)


def test_every_kind_of_value_can_be_given_as_text() -> None:
    flags = {
        "name": "x",
        "limit_bytes": "1.5GiB",
        "ratio": "0.25",
        "fast": "yes",
        "paths": "/a,/b",
        "address": "tcp:127.0.0.1:80",
        "servers": "unix:/a,tcp:127.0.0.1:80",
    }
    tcp = Address.tcp("127.0.0.1", 80)
    assert load(Example, "agent", flags=flags) == Example(
        "x", 3 << 29, 0.25, True, ("/a", "/b"), tcp, (Address.unix("/a"), tcp)
    )


def test_one_address_is_a_list_too() -> None:
    one = (Address.unix("/m"),)
    assert load(Example, "agent", flags={"name": "x", "servers": "unix:/m"}).servers == one
    file = read_file('[agent]\nname = "x"\nservers = ["unix:/m"]', "kvfs.toml")
    assert load(Example, "agent", file=file).servers == one
    assert metadata_addresses("unix:/m") == one
    assert metadata_addresses("unix:/m,tcp:localhost:1") == (*one, Address.tcp("localhost", 1))


def test_errors_name_the_source() -> None:
    name = {"name": "x"}
    assert problem().startswith("agent.name is not set: give --name or KVFS_AGENT_NAME")
    file = read_file("[agent]\nratio = 'half'", "kvfs.toml")
    assert problem(flags=name, file=file) == "kvfs.toml: agent.ratio: not a number: 'half'"
    environment = {"KVFS_AGENT_LIMIT_BYTES": "10Q"}
    assert problem(flags=name, environment=environment).startswith(
        "KVFS_AGENT_LIMIT_BYTES: not a size: '10Q'"
    )
    assert problem(flags=name | {"fast": "maybe"}).startswith("--fast: neither true nor false")
    assert problem(flags=name | {"address": "nowhere"}).startswith("--address: not an address")
    servers = name | {"servers": "unix:/a,nowhere"}
    assert problem(flags=servers).startswith("--servers: not an address: 'nowhere'")
    assert problem(environment={"KVFS_AGENT_COLOUR": "red"}) == "KVFS_AGENT_COLOUR: no such setting"
    assert (
        problem(flags=name, file={"agent": {"fast": 1}}) == "kvfs.toml: agent.fast: 1 is not a bool"
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[agent", "kvfs.toml: "),
        ("[agnet]\n", "no such section: agnet"),
        ("up = 1", "no such section: up"),
    ],
)
def test_a_wrong_file_is_refused(text: str, part: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(part)):
        read_file(text, "kvfs.toml")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("10G", 10 << 30),
        ("512MiB", 512 << 20),
        ("1.5 t", 3 << 39),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1e9", "10 G B", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert [settings.format_size(n) for n in (0, 1023, 1536, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 TiB",
    ]


# --- docs


def test_every_setting_is_documented_under_its_section() -> None:
    sections = re.split(r"^## ", (DOCS / "configuration.md").read_text(), flags=re.MULTILINE)
    for name, cls in CONFIGS.items():
        (section,) = [s for s in sections if s.startswith(f"`[{name}]`")]
        assert f"KVFS_{name.upper()}_" in section
        documented = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
        assert documented == [s.name for s in settings_of(cls, name)], name


def commands(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in kvfs.cli.COMMANDS if group is kvfs.cli.cli else group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", c) for inner, c in commands(command))
        else:
            yield name, command


def test_every_command_and_flag_is_documented() -> None:
    text = (DOCS / "cli.md").read_text() + (DOCS / "configuration.md").read_text()
    known = {s.flag for name, cls in CONFIGS.items() for s in settings_of(cls, name)}
    found = dict(commands(kvfs.cli.cli))
    assert {"up", "serve chunks", "stat"} <= set(found)
    for name, command in found.items():
        assert re.search(rf"`kvfs {name}\b", text), name
        assert command.help, name
        for parameter in command.params:
            if not isinstance(parameter, click.Option) or parameter.hidden:
                continue
            for flag in parameter.opts:
                assert flag in known or re.search(rf"`{flag}[` ]", text), f"{name} {flag}"


def test_every_exit_code_is_documented() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (DOCS / "cli.md").read_text(), flags=re.MULTILINE)
    assert {int(code): name for code, name in rows} == {code.value: code.name for code in ExitCode}


def test_command_descriptions_match_between_help_and_commands() -> None:
    """The list of `kvfs --help` is written down so that it costs no imports."""
    for name, command in commands(kvfs.cli.cli):
        if " " not in name:
            assert kvfs.cli.COMMANDS[name][1].endswith(".")
            assert command.name == name


# --- exit codes


@pytest.mark.parametrize("cls", errors.WIRE_CODES.values(), ids=lambda cls: cls.wire_code)
def test_every_error_is_one_line_and_no_bug(cls: type[errors.KvfsError]) -> None:
    code, text = exit_for(cls())
    assert code not in (ExitCode.OK, ExitCode.BUG)
    assert text
    assert "\n" not in text


def test_errors_out_of_nurseries_are_unwrapped() -> None:
    inner = errors.AlreadyRunning(directory="/d", pid=7)
    group = BaseExceptionGroup("", [KeyError("x"), ExceptionGroup("", [inner])])
    code, text = exit_for(ExceptionGroup("", [inner]))
    assert (code, "pid 7" in text) == (ExitCode.ALREADY_RUNNING, True)
    assert exit_for(group)[0] is ExitCode.BUG
    assert exit_for(ExceptionGroup("", [KeyError("x"), inner]))[0] is ExitCode.ALREADY_RUNNING


def test_a_failed_role_passes_its_own_reason_on() -> None:
    busy = errors.RoleFailed(role="mount", exit_code=ExitCode.MOUNT_BUSY, detail="kvfs: it is busy")
    assert exit_for(busy) == (ExitCode.MOUNT_BUSY, "mount did not start (exit code 7): it is busy")
    assert exit_for(errors.RoleFailed(role="agent", exit_code=-9))[0] is ExitCode.ROLE_FAILED


def test_a_taken_port_has_its_own_code() -> None:
    taken = errors.ConnectionLost(address="tcp:127.0.0.1:1", detail="Address already in use")
    assert exit_for(taken)[0] is ExitCode.ADDRESS_IN_USE
    assert exit_for(errors.ConnectionLost(detail="refused"))[0] is ExitCode.UNREACHABLE


def test_unexpected_errors_are_called_bugs() -> None:
    assert exit_for(KeyError("x"))[0] is ExitCode.BUG
    assert exits.explain(OSError(13, "Permission denied", "/x")) == "/x: Permission denied"


# --- logs


def test_a_record_is_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as exc:
        record = logging.LogRecord(
            "kvfs.x", logging.ERROR, "f", 1, "what %s", ("a\nb",), (ValueError, exc, None)
        )
    line = logs.LineFormatter().format(record)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z error kvfs\.x: what a\\nb.*", line)
    assert "ValueError: two\\nlines" in line


def test_levels_of_logs() -> None:
    assert logs.parse_levels("") == {"": logging.INFO}
    assert logs.parse_levels("warning,kvfs_datapath=debug") == {
        "": logging.WARNING,
        "kvfs_datapath": logging.DEBUG,
    }
    with pytest.raises(InvalidRequest, match="KVFS_LOG"):
        logs.parse_levels("loud")
