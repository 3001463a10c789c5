"""Mounts, serves and unmounts."""

from __future__ import annotations

import functools
import logging
import os
import types

import trio

from kvfs.mount import system
from kvfs.mount.backend import Backend
from kvfs.mount.config import MountConfig
from kvfs.mount.filesystem import Filesystem
from kvfs_base.errors import ConnectionLost, FuseMissing, KvfsError, MountFailed, MountPointBusy
from kvfs_base.seams import Env
from kvfs_datapath.client import ChunkClient
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


async def run_mount(
    env: Env,
    config: MountConfig,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Reports started once mounted; serves until cancelled or unmounted by somebody, and leaves no
    mount behind. Raises MountFailed, FuseMissing, MountPointBusy, or what the metadata service
    answered (ConnectionLost if it does not run). One mount a process."""
    frontend = _load_frontend()
    await _prepare(config)
    system.raise_open_files_limit()
    try:
        await _connect_and_run(env, frontend, config, task_status)
    except ExceptionGroup as group:
        raise _only(group) from None


def _only(error: Exception) -> Exception:
    """Nurseries wrap the one error that callers can act on."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def _connect_and_run(
    env: Env,
    frontend: types.ModuleType,
    config: MountConfig,
    task_status: trio.TaskStatus[None],
) -> None:
    session = env.rng.randbytes(SESSION_BYTES)
    async with MetadataClient(env, config.metadata, session=session) as metadata:
        await _reach(metadata, config)
        cluster = ClusterView(env, config.metadata)
        chunks = ChunkClient(env, cluster, prefer=config.transport)
        try:
            backend = Backend(env, metadata, chunks)
            filesystem = Filesystem(backend, attribute_seconds=config.attribute_seconds)
            await _run(frontend, filesystem, config, task_status)
        finally:
            chunks.close()
            cluster.close()


async def _reach(metadata: MetadataClient, config: MountConfig) -> None:
    """Raises ConnectionLost: the client itself would wait longer for a service to come."""
    with trio.move_on_after(REACH_SECONDS):
        await metadata.call(StatFs())
        return
    detail = "the metadata service does not answer"
    raise ConnectionLost(address=str(config.metadata), detail=detail)


def _load_frontend() -> types.ModuleType:
    try:
        from kvfs.mount import pyfuse3_frontend
    except ImportError as exc:
        raise FuseMissing(
            detail=f"{exc}: install the extra 'fuse' (pip install 'kvfs[fuse]'; it builds on "
            "libfuse3-dev, pkg-config and gcc)"
        ) from exc
    return pyfuse3_frontend


async def _prepare(config: MountConfig) -> None:
    """The mount point is free, if need be after removing what a killed mount left."""
    system.check_fuse()
    while (found := system.mounted_at(config.mountpoint)) is not None:
        dead = False
        if found.type == system.FILE_SYSTEM_TYPE:
            with trio.move_on_after(PROBE_SECONDS):
                dead = await trio.to_thread.run_sync(
                    system.is_dead, config.mountpoint, abandon_on_cancel=True
                )
        if not dead:
            detail = f"a file system of type {found.type} is mounted there"
            raise MountPointBusy(detail=detail, mountpoint=config.mountpoint)
        log.info("removing a dead mount from %s", config.mountpoint)
        system.unmount(config.mountpoint, lazy=True)
    system.check_mountpoint(config.mountpoint)


async def _run(
    frontend: types.ModuleType,
    filesystem: Filesystem,
    config: MountConfig,
    task_status: trio.TaskStatus[None],
) -> None:
    try:
        frontend.mount(filesystem, config)
    except RuntimeError as exc:
        raise MountFailed(detail=str(exc), mountpoint=config.mountpoint) from exc
    stopped = trio.Event()
    serving = trio.CancelScope(shield=True)  # requests are answered while we unmount

    async def serve() -> None:
        try:
            with serving:
                await frontend.serve()
        finally:
            stopped.set()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            nursery.start_soon(filesystem.write_back_forever)
            try:
                await trio.to_thread.run_sync(_greet, config, abandon_on_cancel=True)
                log.info("mounted at %s", config.mountpoint)
                task_status.started()
                await stopped.wait()
            finally:
                with trio.CancelScope(shield=True):
                    await _shut_down(frontend, filesystem, config, stopped)
                    serving.cancel()
            nursery.cancel_scope.cancel()
    finally:
        frontend.close()
        log.info("unmounted from %s", config.mountpoint)


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


async def _shut_down(
    frontend: types.ModuleType, filesystem: Filesystem, config: MountConfig, stopped: trio.Event
) -> None:
    if not stopped.is_set():
        if not await _unmount(config):
            log.info("%s is busy: detaching it", config.mountpoint)
            system.unmount(config.mountpoint, lazy=True)
            frontend.stop()
        with trio.move_on_after(config.unmount_seconds):
            await stopped.wait()
    with trio.move_on_after(config.unmount_seconds) as scope:
        try:
            await filesystem.close()
        except KvfsError as exc:
            log.warning("open files were not recorded: %s", exc)
    if scope.cancelled_caught:
        log.warning("open files were not recorded in %s s", config.unmount_seconds)


async def _unmount(config: MountConfig) -> bool:
    """Orderly, while requests are still answered; False if users stay in it."""
    attempt = functools.partial(system.unmount, config.mountpoint, lazy=False)
    with trio.move_on_after(config.unmount_seconds):
        while True:
            if await trio.to_thread.run_sync(attempt, abandon_on_cancel=True):
                return True
            await trio.sleep(RETRY_SECONDS)
    return False
