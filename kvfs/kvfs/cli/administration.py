"""kvfs cluster: what a kvfs consists of, and servers and disks that come and go."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import click
import msgspec

from kvfs.cli.emptying import drained_blocks, state_of, wait_until_empty
from kvfs.cli.figures import chunk_server_figures, told
from kvfs.cli.paths import files_on
from kvfs.cli.targets import env_of, metadata_addresses, target_argument
from kvfs.settings import format_size
from kvfs_base.cluster import Chain, GetClusterMap
from kvfs_base.errors import TargetInUse, TargetUnknown
from kvfs_metadata.client import BlockingMetadataClient
from kvfs_metadata.cluster.admin_messages import (
    AdmitTarget,
    ClusterDetails,
    CountChunks,
    DescribeCluster,
    RemovedTarget,
    RemoveTarget,
    ReplaceTarget,
    SetDraining,
    SpreadDetails,
    TargetDetails,
)

F = TypeVar("F", bound=Callable[..., Any])

PIPE_COLUMNS = 1000
"""Only terminals have a width for which lines are broken."""

names_argument = click.argument("names", nargs=-1, required=True, metavar="NAME...")
json_option = click.option("--json", "as_json", is_flag=True, help="For programs; see docs/cli.md.")
quick_option = click.option("--quick", is_flag=True, help="Without counting blocks and files.")


@click.group()
def cluster() -> None:
    """Look after the servers and disks of a kvfs.

    TARGET is the directory of a running `kvfs up`, or the address of a metadata service. NAME is a
    target (a disk) by its number or uuid, or a chunk server, which stands for all its targets.
    """


@contextlib.contextmanager
def _connected(target: str) -> Iterator[BlockingMetadataClient]:
    client = BlockingMetadataClient(env_of(target), metadata_addresses(target))
    try:
        yield client
    finally:
        client.close()


# --- looking


class Held(msgspec.Struct):
    """What lies on a chain or a target."""

    blocks: int = 0
    block_bytes: int = 0
    files: int = 0
    """With chunks there: one that is on two chains of a target counts twice."""
    file_chunks: int = 0

    def add(self, other: Held) -> None:
        self.blocks += other.blocks
        self.block_bytes += other.block_bytes
        self.files += other.files
        self.file_chunks += other.file_chunks


def count_chunks(client: BlockingMetadataClient) -> defaultdict[int, Held]:
    """By chain. Page by page, so what changes meanwhile is counted or not."""
    found: defaultdict[int, Held] = defaultdict(Held)
    for files in (False, True):
        start: int | None = 0
        while start is not None:
            page = client.call(CountChunks(files, start))
            for counted in page.chains:
                held = found[counted.chain]
                if files:
                    held.add(Held(files=counted.count, file_chunks=counted.chunks))
                else:
                    held.add(Held(blocks=counted.count, block_bytes=counted.bytes))
            start = page.next or None
    return found


def _held_by(target: TargetDetails, counts: dict[int, Held]) -> Held:
    held = Held()
    for chain in target.chains:
        held.add(counts.get(chain, Held()))
    return held


def _describe_target(target: TargetDetails, held: Held | None) -> dict[str, Any]:
    found = {
        "target_id": target.target_id,
        "uuid": target.uuid,
        "server": target.server_id,
        "addresses": [str(a) for a in (target.unix, target.tcp) if a is not None],
        "state": target.state.value,
        "draining": target.draining,
        "keep_blocks": target.keep_blocks,
        "drained": target.drained,
        "capacity_bytes": target.capacity_bytes,
        "free_bytes": target.free_bytes,
        "chains": target.chains,
        "removals": target.removals,
        "heard_seconds": round(target.heard_seconds, 1),
        "host": target.host,
        "rack": target.rack,
        "replaces": target.replaces,
    }
    return found if held is None else found | msgspec.structs.asdict(held)


def _print_json(found: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    console.print(table)


@cluster.command()
@target_argument
@json_option
@click.option("--metrics", is_flag=True, help="Ask the chunk servers for what they count, too.")
def nodes(target: str, *, as_json: bool, metrics: bool) -> None:
    """List metadata servers, chunk servers and removed targets."""
    with _connected(target) as client:
        details: ClusterDetails = client.call(DescribeCluster())
        known = client.call(GetClusterMap()).targets if metrics else ()
    figures, silent = chunk_server_figures(env_of(target), known)
    servers: dict[str, list[TargetDetails]] = defaultdict(list)
    for one in details.targets:
        servers[one.server_id].append(one)
    found = {
        "metadata": [
            {
                "number": server.number.hex(),
                "addresses": server.addresses,
                "alive": server.alive,
                "answering": server.answering,
                "beats": server.beats,
            }
            for server in details.servers
        ],
        "chunk_servers": [
            _describe_server(name, on) | ({"metrics": figures.get(name)} if metrics else {})
            for name, on in servers.items()
        ],
        "removed": [_describe_removed(gone) for gone in details.removed],
    }
    if as_json:
        _print_json(found)
    else:
        _show_nodes(found)
        for name, counted in figures.items():
            click.echo(f"{name}  {told(counted)}")
    for error in silent:
        click.echo(f"no answer from {error}", err=True)


def _describe_server(name: str, targets: list[TargetDetails]) -> dict[str, Any]:
    return {
        "server": name,
        "addresses": [str(a) for a in (targets[0].unix, targets[0].tcp) if a is not None],
        "host": targets[0].host,
        "rack": targets[0].rack,
        "targets": [target.target_id for target in targets],
        "states": [state_of(target) for target in targets],
        "heard_seconds": round(min(target.heard_seconds for target in targets), 1),
    }


def _describe_removed(gone: RemovedTarget) -> dict[str, Any]:
    return {
        "uuid": gone.uuid,
        "target_id": gone.target_id,
        "server": gone.server_id,
        "removed_ns": gone.removed_ns,
    }


def _show_nodes(found: dict[str, list[dict[str, Any]]]) -> None:
    rows = [
        (
            f"metadata {server['number'][:8]}",
            "alive" if server["alive"] else "not heard of",
            "",
            " ".join(server["addresses"]),
        )
        for server in found["metadata"]
    ]
    rows += [
        (
            f"chunks {server['server']}",
            f"heard {server['heard_seconds']:.1f} s ago",
            ", ".join(
                f"{number} {state}"
                for number, state in zip(server["targets"], server["states"], strict=True)
            ),
            " ".join(server["addresses"]),
        )
        for server in found["chunk_servers"]
    ]
    rows += [
        (f"chunks {gone['server']}", "removed", str(gone["target_id"]), gone["uuid"])
        for gone in found["removed"]
    ]
    _print_table(("node", "state", "targets", "address"), rows)


@cluster.command()
@target_argument
@json_option
@quick_option
def targets(target: str, *, as_json: bool, quick: bool) -> None:
    """List targets: their state, their space, and what lies on them."""
    with _connected(target) as client:
        details: ClusterDetails = client.call(DescribeCluster())
        counts = None if quick else count_chunks(client)
    described = [
        (one, None if counts is None else _held_by(one, counts)) for one in details.targets
    ]
    if as_json:
        _print_json([_describe_target(one, held) for one, held in described])
        return
    columns = ("target", "server", "state", "capacity", "free", "removals")
    _print_table(
        (*columns, *(() if quick else _HELD_COLUMNS)),
        [
            (
                str(one.target_id),
                one.server_id,
                state_of(one),
                format_size(one.capacity_bytes),
                format_size(one.free_bytes),
                f"{one.removals:,}",
                *_held_cells(held),
            )
            for one, held in described
        ],
    )


_HELD_COLUMNS = ("blocks", "size", "files", "chunks")


def _held_cells(held: Held | None) -> tuple[str, ...]:
    if held is None:
        return ()
    return (
        f"{held.blocks:,}",
        format_size(held.block_bytes),
        f"{held.files:,}",
        f"{held.file_chunks:,}",
    )


@cluster.command()
@target_argument
@json_option
@quick_option
def chains(target: str, *, as_json: bool, quick: bool) -> None:
    """List chains: the targets that hold them, in the order of writes, and what lies on them. A
    chain without targets was removed: files have lost chunks there. Below stands how evenly chains
    of several copies load the targets."""
    with _connected(target) as client:
        details: ClusterDetails = client.call(DescribeCluster())
        counts = defaultdict(Held) if quick else count_chunks(client)
    known = {chain.chain_id: chain for chain in details.chains}
    numbers = sorted(known.keys() | counts.keys())
    states = {one.target_id: one for one in details.targets}
    if as_json:
        found = {
            "chains": [
                _describe_chain(number, known.get(number), None if quick else counts[number])
                for number in numbers
            ],
            "spreads": [_describe_spread(spread) for spread in details.spreads],
        }
        _print_json(found)
        return
    _print_table(
        ("chain", "copies", "targets", "state", *(() if quick else _HELD_COLUMNS)),
        [
            (
                *_chain_cells(number, known.get(number), states),
                *_held_cells(None if quick else counts[number]),
            )
            for number in numbers
        ],
    )
    for spread in details.spreads:
        click.echo(
            f"{spread.copies} copies: {spread.chains} chains take new chunks; most over mean: "
            f"shared by two targets {spread.pairs:.2f}, read for a lost target "
            f"{spread.rebuild:.2f}, headed by a target {spread.heads:.2f}"
        )


def _describe_chain(number: int, chain: Chain | None, held: Held | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "chain": number,
        "version": chain.version if chain else 0,
        "copies": chain.copies if chain else 0,
        "targets": chain.targets if chain else (),
        "syncing": chain.syncing if chain else (),
        "offline": chain.offline if chain else (),
    }
    return found if held is None else found | msgspec.structs.asdict(held)


def _describe_spread(spread: SpreadDetails) -> dict[str, Any]:
    return {name: getattr(spread, name) for name in SpreadDetails.__struct_fields__}


def _chain_cells(
    number: int, chain: Chain | None, states: dict[int, TargetDetails]
) -> tuple[str, ...]:
    if chain is None:
        return str(number), "", "", "removed"
    members = [f"{target_id}" for target_id in chain.targets]
    members += [f"{target_id} (syncing)" for target_id in chain.syncing]
    members += [f"{target_id} (offline)" for target_id in chain.offline]
    serving = [states[target_id] for target_id in chain.targets if target_id in states]
    if not chain.is_replicated:
        state = ", ".join(map(state_of, serving))
    elif all(one.state == "offline" for one in serving):
        state = "unavailable"
    else:
        state = "whole" if len(serving) >= chain.copies else "short"
    return str(number), str(chain.copies), ", ".join(members), state


# --- changing


def _named(details: ClusterDetails, name: str) -> list[TargetDetails]:
    """By number, by uuid, or all of a server."""
    tests: tuple[Callable[[TargetDetails], bool], ...] = (
        lambda target: str(target.target_id) == name,
        lambda target: target.uuid == name,
        lambda target: target.server_id == name,
    )
    found: list[TargetDetails] = []
    for test in tests:
        found = found or [target for target in details.targets if test(target)]
    return found


def _require(details: ClusterDetails, name: str) -> list[TargetDetails]:
    """Raises TargetUnknown."""
    found = _named(details, name)
    if not found:
        raise TargetUnknown(name=name)
    return found


def _numbers(targets: Sequence[TargetDetails]) -> tuple[int, ...]:
    return tuple(target.target_id for target in targets)


def _told(numbers: Sequence[int]) -> str:
    return ("target " if len(numbers) == 1 else "targets ") + ", ".join(map(str, numbers))


@cluster.command()
@target_argument
@names_argument
@click.option("--keep-blocks", is_flag=True, help="Blocks stay until they are evicted.")
@click.option("--wait", is_flag=True, help="Show what is left, until nothing is.")
def drain(target: str, names: tuple[str, ...], *, keep_blocks: bool, wait: bool) -> None:
    """Place nothing new on targets, and bring what lies there to others.

    A file of one copy moves while nobody has it open; with --wait those that are open are named.
    `kvfs cluster targets` shows what is left; once nothing is, the state is "drained" and the
    target can be removed. `kvfs cluster add` undoes it. An interrupted --wait does not.
    """
    with _connected(target) as client:
        details: ClusterDetails = client.call(DescribeCluster())
        chosen = [_numbers(_require(details, name)) for name in names]
        given_up = drained_blocks(client)
        for numbers in chosen:
            client.call(SetDraining(numbers, True, keep_blocks))
            moves = (
                "files there are moved, blocks stay" if keep_blocks else "what is there is moved"
            )
            click.echo(f"{_told(numbers)}: takes nothing new, {moves}")
        if wait:
            wait_until_empty(client, {number for numbers in chosen for number in numbers})
            given_up = drained_blocks(client) - given_up
            if given_up > 0:
                click.echo(f"{given_up:,} blocks were given up: there was nowhere to move them")


@cluster.command()
@target_argument
@click.argument("old")
@click.argument("new", required=False)
def replace(target: str, old: str, new: str | None) -> None:
    """Give the places of target OLD in chains of several copies to target NEW: an exchanged disk.

    OLD is away, or draining. NEW is brought in step from the other copies while all goes on;
    `kvfs cluster chains` shows how far it is. Without NEW: the emptiest target of the same server,
    or else of another one. What had one copy on OLD is not brought back.
    """
    with _connected(target) as client:
        details: ClusterDetails = client.call(DescribeCluster())
        lost = _one(details, old)
        other = 0 if new is None else _one(details, new)
        found = client.call(ReplaceTarget(lost, other))
    click.echo(f"target {found} takes the places of target {lost}")


def _one(details: ClusterDetails, name: str) -> int:
    """Raises TargetUnknown, click.UsageError if ``name`` stands for several."""
    found = _require(details, name)
    if len(found) > 1:
        raise click.UsageError(f"{name} has several targets: {_told(_numbers(found))}")
    return found[0].target_id


@cluster.command()
@target_argument
@names_argument
@json_option
@click.option("--force", is_flag=True, help="Even if blocks and files are lost.")
def remove(target: str, names: tuple[str, ...], *, force: bool, as_json: bool) -> None:
    """Take drained targets out of the cluster for good.

    With --force also targets that are not drained, or dead: their blocks are dropped, and the files
    that lose data are listed. Those stay; reading what was lost fails. A removed target that comes
    back is refused until `kvfs cluster add`.
    """
    with _connected(target) as client:
        details: ClusterDetails = client.call(DescribeCluster())
        chosen = [_require(details, name) for name in names]
        removed: list[int] = []
        lost: list[dict[str, Any]] = []
        for leaving in chosen:
            numbers = _numbers(leaving)
            if force:
                on = _only_on(details, set(numbers))
                lost += [{"path": p, "lost_chunks": n} for p, n in files_on(client, on)]
            _remove(client, leaving, force)
            removed += numbers
    if as_json:
        _print_json({"removed": removed, "lost_files": lost})
        return
    click.echo(f"{_told(removed)}: removed")
    for file in lost:
        click.echo(f"lost {file['lost_chunks']} chunks of {file['path']}")


def _only_on(details: ClusterDetails, numbers: set[int]) -> set[int]:
    """Chains that nobody has but these targets."""
    everybody = {c.chain_id: c.targets + c.syncing + c.offline for c in details.chains}
    return {chain_id for chain_id, members in everybody.items() if numbers.issuperset(members)}


def _remove(client: BlockingMetadataClient, leaving: list[TargetDetails], force: bool) -> None:
    """Raises TargetInUse with what is there now."""
    try:
        client.call(RemoveTarget(_numbers(leaving), force))
    except TargetInUse as exc:
        culprit = next(one for one in leaving if one.target_id == exc.target_id)
        held = _held_by(culprit, count_chunks(client))
        # Files that somebody has open may use the target any time, so they count as well.
        raise TargetInUse(
            target_id=exc.target_id,
            blocks=held.blocks,
            files=max(held.files, exc.files),
            removals=exc.removals,
            detail=exc.detail,
        ) from None


@cluster.command()
@target_argument
@names_argument
def add(target: str, names: tuple[str, ...]) -> None:
    """Undo a drain, or let removed targets come back.

    A target that comes back registers with its next heartbeat, as a new and empty one.

    A new server needs no command: it registers by itself with its first heartbeat. To start one:

    kvfs serve chunks --server-id=NAME --directories=DIR --metadata=ADDRESS
    """
    with _connected(target) as client:
        details: ClusterDetails = client.call(DescribeCluster())
        for name in names:
            present = _named(details, name)
            gone = [
                one
                for one in details.removed
                if name in (one.uuid, one.server_id, str(one.target_id))
            ]
            if not present and not gone:
                raise TargetUnknown(name=name)
            if present:
                client.call(SetDraining(_numbers(present), False))
                click.echo(f"{_told(_numbers(present))}: takes new chunks")
            for one in gone:
                client.call(AdmitTarget(one.uuid))
                click.echo(f"target {one.uuid}: may come back")


__all__ = ["cluster"]
