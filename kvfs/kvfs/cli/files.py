"""kvfs ls, cat, put, get, rm, stat: files and blocks without a mount.

Whoever may open the sockets of a kvfs is trusted, so no permissions are checked here.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import stat
import sys
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any, BinaryIO

import click
import msgspec
import trio

from kvfs.cli.targets import env_of, metadata_addresses, target_argument
from kvfs.cli.tree import Tree, open_tree
from kvfs.client import connect
from kvfs_base.errors import EntryNotFound, InvalidRequest
from kvfs_base.limits import BLOCK_BYTES_MAX, BLOCK_KEY_BYTES
from kvfs_base.types import KV_DIRECTORY, Attr, KVLayout


def _run(target: str, operation: Callable[[Tree], Awaitable[None]]) -> None:
    addresses = metadata_addresses(target)
    env = env_of(target)

    async def main() -> None:
        async with open_tree(env, addresses) as tree:
            await operation(tree)

    trio.run(main)


@click.command()
@target_argument
@click.argument("path", default="/")
@click.option("-l", "--long", is_flag=True, help="Modes, sizes and times as well.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def ls(target: str, path: str, *, long: bool, as_json: bool) -> None:
    """List PATH, a directory, a file or a block.

    TARGET is the directory of a running `kvfs up`, or the address of a metadata service.
    """

    def show(name: bytes, attr: Attr) -> None:
        if as_json:
            click.echo(msgspec.json.encode(_described(name, attr)))
        else:
            click.echo(_line(name, attr) if long else name)

    async def operation(tree: Tree) -> None:
        attr = await tree.resolve(os.fsencode(path))
        if not attr.is_dir:
            show(os.fsencode(path), attr)
            return
        async with contextlib.aclosing(tree.entries(attr.inode)) as entries:
            async for name, entry in entries:
                show(name, entry)

    _run(target, operation)


@click.command()
@target_argument
@click.argument("paths", nargs=-1, required=True)
def cat(target: str, paths: tuple[str, ...]) -> None:
    """Write files and blocks to standard output, one after the other."""

    async def operation(tree: Tree) -> None:
        for path in paths:
            await tree.read_to(os.fsencode(path), sys.stdout.buffer)
        sys.stdout.buffer.flush()

    _run(target, operation)


@click.command()
@target_argument
@click.argument("source")
@click.argument("path")
@click.option(
    "--block-tokens",
    type=click.IntRange(min=1),
    help="For a block: make its namespace, with blocks of so many tokens, if it is missing.",
)
def put(target: str, source: str, path: str, block_tokens: int | None) -> None:
    """Store SOURCE, a file or - for standard input, as PATH.

    /kv/TENANT/MODEL/KEY, the key in 64 hex digits, stores a block (TARGET must be a directory); a
    block that is stored already stays as it is. Any other PATH stores an ordinary file, replacing
    it as a whole.
    """
    with contextlib.ExitStack() as stack:
        file: BinaryIO = sys.stdin.buffer
        if source != "-":
            file = stack.enter_context(open(source, "rb"))
        block = _block_path(path)
        if block is None:
            _run(target, lambda tree: _put_file(tree, file, source, path))
        else:
            _put_block(target, *block, file, block_tokens)


async def _put_file(tree: Tree, file: BinaryIO, source: str, path: str) -> None:
    name = os.fsencode(path)
    with contextlib.suppress(EntryNotFound):
        if (await tree.resolve(name)).is_dir and source != "-":
            name = name + b"/" + os.fsencode(os.path.basename(source))
    await tree.write_from(name, file)


def _put_block(
    target: str, namespace: str, key: bytes, file: BinaryIO, block_tokens: int | None
) -> None:
    if target.startswith(("unix:", "tcp:")):
        raise InvalidRequest(detail="blocks are put through an agent: TARGET must be a directory")
    data = file.read(BLOCK_BYTES_MAX + 1)
    if len(data) > BLOCK_BYTES_MAX:
        raise InvalidRequest(detail=f"a block has at most {BLOCK_BYTES_MAX} bytes")
    metadata_addresses(target)  # tells a directory that is none from one where nothing runs
    with connect(target) as client:
        try:
            opened = client.namespace(namespace)
        except EntryNotFound:
            if block_tokens is None:
                raise
            layout = KVLayout(block_tokens=block_tokens)
            opened = client.namespace(namespace, layout, create=True)
        opened.put([key], [data])


@click.command()
@target_argument
@click.argument("path")
@click.argument("destination")
def get(target: str, path: str, destination: str) -> None:
    """Fetch PATH, a file or a block, to DESTINATION: a file, a directory, or - for standard output.

    A file that exists is replaced as a whole.
    """
    if destination == "-":
        out = sys.stdout.buffer
        _run(target, lambda tree: tree.read_to(os.fsencode(path), out))
        out.flush()
        return
    if os.path.isdir(destination):
        destination = os.path.join(destination, os.path.basename(path.rstrip("/")))
    directory = os.path.dirname(os.path.abspath(destination))
    descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=".kvfs-get-")
    try:
        with open(descriptor, "wb") as file:
            _run(target, lambda tree: tree.read_to(os.fsencode(path), file))
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(descriptor, 0o666 & ~umask)
        os.replace(temporary, destination)
    except BaseException:
        os.unlink(temporary)
        raise


@click.command()
@target_argument
@click.argument("paths", nargs=-1, required=True)
@click.option("-r", "--recursive", is_flag=True, help="Directories with what is in them.")
@click.option("-f", "--force", is_flag=True, help="Missing paths are no error.")
def rm(target: str, paths: tuple[str, ...], *, recursive: bool, force: bool) -> None:
    """Remove files, blocks and empty directories."""

    async def operation(tree: Tree) -> None:
        for path in paths:
            try:
                await tree.remove(os.fsencode(path), recursive=recursive)
            except EntryNotFound:
                if not force:
                    raise

    _run(target, operation)


@click.command("stat")
@target_argument
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def stat_(target: str, path: str, *, as_json: bool) -> None:
    """Show the attributes of PATH. For a block also its key, checksum and generation."""

    async def operation(tree: Tree) -> None:
        attr = await tree.resolve(os.fsencode(path), follow=False)
        found = _described(os.fsencode(path), attr)
        if stat.S_ISLNK(attr.mode):
            found["target"] = os.fsdecode(await tree.read_link(attr.inode))
        if as_json:
            click.echo(msgspec.json.encode(found))
        else:
            for key, value in found.items():
                click.echo(f"{key:>10}  {value}")

    _run(target, operation)


def _block_path(path: str) -> tuple[str, bytes] | None:
    """(TENANT/MODEL, key) of a path below /kv whose last name is a key in hex, else None."""
    names = [name for name in path.split("/") if name]
    if len(names) < 3 or names[0] != KV_DIRECTORY.decode() or len(names[-1]) != 2 * BLOCK_KEY_BYTES:
        return None
    try:
        return "/".join(names[1:-1]), bytes.fromhex(names[-1])
    except ValueError:
        return None


def _described(name: bytes, attr: Attr) -> dict[str, Any]:
    """What ``stat`` and ``--json`` tell of an entry."""
    kind = "block" if attr.is_block else "namespace" if attr.is_namespace else _kind(attr.mode)
    found: dict[str, Any] = {
        "name": name.decode(errors="surrogateescape").encode(errors="replace").decode(),
        "type": kind,
        "inode": attr.inode,
        "mode": stat.filemode(attr.mode),
        "links": attr.nlink,
        "uid": attr.uid,
        "gid": attr.gid,
        "size": attr.size,
        "modified": _time(attr.mtime_ns),
    }
    if attr.is_block:
        found |= {"key": attr.key.hex(), "generation": attr.inode, "crc32c": f"{attr.crc32c:08x}"}
    if attr.layout is not None:
        found["chunks"] = attr.layout.chunk_bytes
        found["chains"] = ",".join(map(str, attr.layout.chains))
    return found


def _kind(mode: int) -> str:
    names = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
    return names.get(stat.S_IFMT(mode), "special")


def _time(nanoseconds: int) -> str:
    when = datetime.datetime.fromtimestamp(nanoseconds // 10**9, datetime.UTC)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def _line(name: bytes, attr: Attr) -> bytes:
    mode, modified = stat.filemode(attr.mode), _time(attr.mtime_ns)
    return f"{mode} {attr.nlink:>4} {attr.size:>12} {modified} ".encode() + name
