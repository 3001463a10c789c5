"""Mounts, serves and unmounts."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import platform
from collections.abc import Callable
from typing import Protocol

import trio

from kvfs.mount import system
from kvfs.mount.backend import Backend, MetadataCalls
from kvfs.mount.config import MountConfig
from kvfs.mount.filesystem import Filesystem
from kvfs.mount.frontend import Choice, Frontend, choose, make
from kvfs.mount.names import Names
from kvfs_base.errors import ConnectionLost, InvalidRequest, KvfsError, MountFailed, MountPointBusy
from kvfs_base.os_cpu import sleeps_at_once
from kvfs_base.os_env import raise_open_files_limit
from kvfs_base.seams import Env
from kvfs_datapath.client.chunk_client import ChunkClient
from kvfs_metadata.client import ClusterView, MetadataClient
from kvfs_metadata.messages import StatFs

log = logging.getLogger(__name__)

PROBE_SECONDS = 5.0
"""How long the mount that lies at the mount point may take to show that it is alive."""
REACH_SECONDS = 10.0
"""How long the metadata service may take to answer for the first time."""
RETRY_SECONDS = 0.05
"""Between two attempts to unmount a busy file system."""
SESSION_BYTES = 16


class Namespace(MetadataCalls, Protocol):
    """What a mount asks for everything."""

    def watch(self, watcher: Names) -> None: ...


Connect = Callable[[bytes, str], contextlib.AbstractAsyncContextManager[Namespace]]
"""With a new session and what people are told of it."""


async def run_mount(
    env: Env,
    config: MountConfig,
    *,
    connect: Connect | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Reports started once mounted; serves until cancelled or unmounted by somebody, and leaves no
    mount behind. Raises MountFailed, FuseMissing, MountPointBusy, or what the metadata service
    answered (ConnectionLost if it does not run). One mount a process. ``connect`` is for names that
    lie elsewhere than at ``config.metadata``."""
    choice = choose(config.frontend)
    if choice.name == "pyfuse3" and config.locks == "cluster":
        raise InvalidRequest(detail="locks in the cluster need the direct front end")
    await _prepare(config)
    raise_open_files_limit()
    mount = _Mount(env, config, choice, connect)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.watch_for_cancellation)
            await mount.run(task_status)
            nursery.cancel_scope.cancel()
    except ExceptionGroup as group:
        raise _only(group) from None


def _only(error: Exception) -> Exception:
    """Nurseries wrap the one error that callers can act on."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def _prepare(config: MountConfig) -> None:
    """The mount point is free, or has what a killed mount left. That stays until we can mount: as
    long as it is there nobody writes into the directory below without noticing."""
    system.check_fuse()
    if system.mounted_at(config.mountpoint) is None:
        system.check_mountpoint(config.mountpoint, may_have_files=config.allow_nonempty)
    else:
        await _check_dead(config.mountpoint)


async def _check_dead(mountpoint: str) -> None:
    """Raises MountPointBusy unless a kvfs lies there whose process is gone."""
    found = system.mounted_at(mountpoint)
    dead = False
    if found is not None and found.type == system.FILE_SYSTEM_TYPE:
        with trio.move_on_after(PROBE_SECONDS):
            dead = await trio.to_thread.run_sync(system.is_dead, mountpoint, abandon_on_cancel=True)
    if found is not None and not dead:
        detail = f"a file system of type {found.type} is mounted there"
        raise MountPointBusy(detail=detail, mountpoint=mountpoint)


async def _remove_dead(mountpoint: str) -> None:
    while system.mounted_at(mountpoint) is not None:
        await _check_dead(mountpoint)
        log.info("removing a dead mount from %s", mountpoint)
        system.unmount(mountpoint, lazy=True)


class _Mount:
    """One mount, from the first call of the metadata service to the last.

    Unmounting needs everything that serving needs: the kernel sends what is left, and sizes are
    recorded. So all of it runs shielded from cancellation, which only asks it to end.
    """

    def __init__(
        self, env: Env, config: MountConfig, choice: Choice, connect: Connect | None
    ) -> None:
        self._env = env
        self._config = config
        self._choice = choice
        self._connect = connect or self._dial
        self._work = trio.CancelScope(shield=True)
        self._mounted = False
        self._end = trio.Event()
        """Somebody asked for the end, or unmounted the file system."""
        self._served = trio.Event()
        """No further request will come."""

    async def watch_for_cancellation(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            if self._mounted:
                self._end.set()
            else:
                self._work.cancel()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        env, config = self._env, self._config
        session = env.rng.randbytes(SESSION_BYTES)
        name = f"{config.mountpoint} on {platform.node()} (pid {os.getpid()})"
        with self._work:
            async with self._connect(session, name) as metadata:
                await self._reach(metadata)
                cluster = ClusterView(env, config.metadata)
                chunks = ChunkClient(env, cluster, prefer=config.transport)
                try:
                    backend = Backend(env, metadata, chunks)
                    metadata.watch(backend.names)
                    filesystem = Filesystem(backend, attribute_seconds=config.attribute_seconds)
                    frontend = make(self._choice, filesystem, config)
                    await self._mount(filesystem, frontend, task_status)
                finally:
                    chunks.close()
                    cluster.close()

    def _dial(self, session: bytes, name: str) -> MetadataClient:
        return MetadataClient(self._env, self._config.metadata, session=session, name=name)

    async def _reach(self, metadata: Namespace) -> None:
        """Raises ConnectionLost: the client itself would wait longer for a service to come."""
        with trio.move_on_after(REACH_SECONDS):
            await metadata.call(StatFs())
            return
        detail = "the metadata service does not answer"
        raise ConnectionLost(address=",".join(map(str, self._config.metadata)), detail=detail)

    async def _mount(
        self, filesystem: Filesystem, frontend: Frontend, task_status: trio.TaskStatus[None]
    ) -> None:
        config = self._config
        await _remove_dead(config.mountpoint)
        frontend.mount()
        self._mounted = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve, frontend)
                nursery.start_soon(filesystem.write_back_forever)
                nursery.start_soon(filesystem.tidy_forever)
                try:
                    await trio.to_thread.run_sync(_greet, config, abandon_on_cancel=True)
                    log.info("mounted at %s (%s: %s)", config.mountpoint, *self._choice)
                    if sleeps_at_once():
                        log.info("small requests are slow: guest_halt_poll_ns of this machine is 0")
                    task_status.started()
                    await self._end.wait()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._shut_down(filesystem, frontend)
                    nursery.cancel_scope.cancel()
        finally:
            frontend.close()
            log.info("unmounted from %s", config.mountpoint)

    async def _serve(self, frontend: Frontend) -> None:
        try:
            await frontend.serve()
        finally:
            self._served.set()
            self._end.set()

    async def _shut_down(self, filesystem: Filesystem, frontend: Frontend) -> None:
        config = self._config
        if not self._served.is_set():
            if not await self._unmount():
                users = await trio.to_thread.run_sync(system.users_of, config.mountpoint)
                held = "; ".join(users) or "nobody that can be seen here"
                log.info("%s is busy: detaching it (used by %s)", config.mountpoint, held)
                system.unmount(config.mountpoint, lazy=True)
                frontend.stop()
            with trio.move_on_after(config.unmount_seconds):
                await self._served.wait()
        with trio.move_on_after(config.unmount_seconds) as scope:
            try:
                await filesystem.close()
            except KvfsError as exc:
                log.warning("open files were not recorded: %s", exc)
        if scope.cancelled_caught:
            log.warning("open files were not recorded in %s s", config.unmount_seconds)

    async def _unmount(self) -> bool:
        """Orderly, while requests are still answered; False if users stay in it."""
        attempt = functools.partial(system.unmount, self._config.mountpoint, lazy=False)
        with trio.move_on_after(self._config.unmount_seconds):
            while True:
                if await trio.to_thread.run_sync(attempt, abandon_on_cancel=True):
                    return True
                await trio.sleep(RETRY_SECONDS)
        return False


def _greet(config: MountConfig) -> None:
    """The first request, in a thread. The kernel takes a read-ahead only after it, because the
    answer to its INIT sets one."""
    try:
        os.stat(config.mountpoint)
    except OSError as exc:
        detail = f"the mount does not answer: {exc.strerror}"
        raise MountFailed(detail=detail, mountpoint=config.mountpoint) from exc
    if not system.set_read_ahead(config.mountpoint, config.read_ahead_bytes):
        log.info("the kernel's default read-ahead stays")
