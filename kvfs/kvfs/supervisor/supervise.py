"""Starts all roles, restarts those that crash, stops them in order.

Invariants: one task, ``_Keeper.run``, starts the processes of a role, one at a time. Stopping a
role first sets ``stopping`` and then ends its process: whatever the keeper is doing, it returns
instead of starting another. The tasks that watch processes live in the outermost nursery, which is
cancelled only when every process has ended.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable

import trio

from kvfs.supervisor import locks, mounts
from kvfs.supervisor.child import Child, RotatingLog
from kvfs.supervisor.config import UpConfig
from kvfs.supervisor.home import Endpoints, Home, RoleState
from kvfs.supervisor.roles import MOUNT, Role, Roles
from kvfs_base.cluster import TargetState
from kvfs_base.errors import AlreadyRunning, KvfsError, RoleFailed
from kvfs_base.os_env import os_env
from kvfs_base.rpc import RpcClient
from kvfs_metadata.cluster.admin_messages import ClusterDetails, DescribeCluster

log = logging.getLogger(__name__)

BACKOFF_SECONDS_MIN = 0.1
BACKOFF_SECONDS_MAX = 5.0
STEADY_SECONDS = 30.0
"""A role that ran this long before it crashed is restarted without much delay again."""

LEFTOVER_SECONDS = 10.0
"""Children of a killed supervisor get SIGTERM from the kernel; those that are there after this long
are killed."""

POLL_SECONDS = 0.05


class _Keeper:
    """Keeps one role running."""

    def __init__(
        self,
        role: Role,
        config: UpConfig,
        log_file: RotatingLog,
        lock: int,
    ) -> None:
        self.role = role
        self.state = RoleState(address=None if role.address is None else str(role.address))
        self._config = config
        self._log_file = log_file
        self._lock = lock
        self._stopping = trio.Event()
        self._child: Child | None = None
        self._pause = trio.CancelScope()

    async def run(
        self,
        nursery: trio.Nursery,
        changed: Callable[[], None],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Returns when stopped. Raises RoleFailed if the first start fails; later ones are tried
        again for ever."""
        backoff = BACKOFF_SECONDS_MIN
        served = False
        while not self._stopping.is_set():
            began = trio.current_time()
            try:
                child = self._spawn(nursery)
                await child.wait_ready(self._config.ready_seconds)
            except RoleFailed as exc:
                if self._stopping.is_set():
                    return
                if not served:
                    raise
                log.error("%s", exc)
                await self._end_child()
            else:
                self.state.state = "serving"
                if not served:
                    served = True
                    task_status.started()
                changed()
                await child.ended.wait()
            if self._stopping.is_set():
                return
            if trio.current_time() - began > STEADY_SECONDS:
                backoff = BACKOFF_SECONDS_MIN
            await self._rest(backoff, changed)
            backoff = min(2 * backoff, BACKOFF_SECONDS_MAX)

    def _spawn(self, nursery: trio.Nursery) -> Child:
        try:
            child = Child(self.role.name, self.role.argv, self._log_file, self._lock)
        except OSError as exc:
            raise RoleFailed(role=self.role.name, detail=f"cannot start: {exc}") from exc
        self._child = child
        self.state.pid = child.pid
        nursery.start_soon(child.run)
        return child

    async def _rest(self, seconds: float, changed: Callable[[], None]) -> None:
        code = None if self._child is None else self._child.exit_code
        log.error("%s ended with %s, starting it again in %g s", self.role.name, code, seconds)
        self.state.state = "restarting"
        self.state.pid = None
        self.state.restarts += 1
        changed()
        self._pause = trio.CancelScope()
        with self._pause:
            await trio.sleep(seconds)

    async def stop(self) -> None:
        """Ends the process; kills it if it does not end by itself in time."""
        self._stopping.set()
        self._pause.cancel()
        await self._end_child()

    async def _end_child(self) -> None:
        if self._child is None:
            return
        if not await self._child.stop(self._config.stop_seconds):
            log.error("%s did not stop in %g s", self.role.name, self._config.stop_seconds)

    def kill(self) -> None:
        if self._child is not None:
            self._child.signal(signal.SIGKILL)


class Supervisor:
    """Runs one kvfs until it is told to stop. Used once.

    ``run`` is called with the lock of ``home`` held.
    """

    def __init__(
        self, home: Home, config: UpConfig, roles: Roles, left_mount: str | None = None
    ) -> None:
        """``left_mount`` is where an earlier supervisor, which was killed, had mounted."""
        self._home = home
        self._left_mount = left_mount
        self._config = config
        self._roles = roles
        self._scope = trio.CancelScope()
        self._keepers: dict[str, _Keeper] = {}
        self._serving = False
        self._started_ns = time.time_ns()

    async def run(self, on_ready: Callable[[Endpoints], None]) -> None:
        """Returns after SIGINT, SIGTERM or SIGHUP, with every process gone and nothing mounted. A
        second signal does not wait for anybody. Raises RoleFailed if a role does not start, and
        what ``mounts.prepare`` raises."""
        self._home.remove_endpoints()
        with self._home.children_lock_path.open("ab") as lock:
            await self._wait_for_leftovers(lock.fileno())
            self._prepare_mount()
            async with trio.open_nursery() as nursery:
                await nursery.start(self._watch_signals)
                try:
                    with self._scope:
                        await self._start(nursery, lock.fileno())
                        self._serving = True
                        self._write_endpoints()
                        on_ready(self._endpoints())
                        await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._stop()
                nursery.cancel_scope.cancel()

    async def _watch_signals(
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as received:
            task_status.started()
            async for number in received:
                log.info("got %s", signal.Signals(number).name)
                if self._scope.cancel_called:
                    for keeper in self._keepers.values():
                        keeper.kill()
                self._scope.cancel()

    async def _wait_for_leftovers(self, lock: int) -> None:
        """Processes of a killed supervisor hold this lock until they are gone: two metadata
        services on one database, or two chunk servers on one target, must never be."""
        deadline = trio.current_time() + LEFTOVER_SECONDS
        killed = False
        while not locks.acquire(lock):
            if trio.current_time() > deadline:
                left = locks.holders(self._home.children_lock_path)
                if killed:
                    raise AlreadyRunning(directory=str(self._home.directory), pid=min(left or [0]))
                for pid in left:
                    log.error("killing process %d that an earlier supervisor left", pid)
                    os.kill(pid, signal.SIGKILL)
                killed, deadline = True, trio.current_time() + LEFTOVER_SECONDS
            await trio.sleep(POLL_SECONDS)

    def _prepare_mount(self) -> None:
        if self._left_mount is not None:
            mounts.detach_dead(self._left_mount)
        if self._config.mountpoint is not None:
            mounts.prepare(self._config.mountpoint)

    async def _start(self, nursery: trio.Nursery, lock: int) -> None:
        def keeper(role: Role) -> _Keeper:
            log_file = RotatingLog(
                self._home.log / f"{role.name}.log", limit=self._config.log_bytes
            )
            made = _Keeper(role, self._config, log_file, lock)
            self._keepers[role.name] = made
            return made

        async def start(role: Role) -> None:
            await nursery.start(keeper(role).run, nursery, self._write_endpoints)
            log.info("%s is serving", role.name)

        # The metadata service alone: the others would spend their first second in redialling. The
        # mount last: from the moment that it can be seen it works.
        await start(self._roles.metadata)
        async with trio.open_nursery() as starting:
            for role in (*self._roles.chunk_servers, self._roles.agent):
                starting.start_soon(start, role)
        with trio.move_on_after(self._config.ready_seconds) as scope:
            await self._wait_for_targets()
        if scope.cancelled_caught:
            raise RoleFailed(role="chunks", detail="not all targets are serving")
        if self._roles.mount is not None:
            await start(self._roles.mount)

    async def _wait_for_targets(self) -> None:
        """Until every chunk server has told the metadata service of its target, but for those that
        were removed from the cluster."""
        address = self._roles.metadata.address
        assert address is not None
        async with RpcClient(os_env().network, address) as client:
            while True:
                try:
                    cluster: ClusterDetails = await client.call(DescribeCluster())
                except KvfsError as exc:
                    log.info("targets: %s", exc)
                else:
                    known = {t.server_id for t in cluster.targets if _is_serving(t.state)}
                    known |= {gone.server_id for gone in cluster.removed}
                    if {role.name for role in self._roles.chunk_servers} <= known:
                        return
                await trio.sleep(POLL_SECONDS)

    async def _stop(self) -> None:
        self._serving = False
        for group in self._roles.in_stop_order():
            async with trio.open_nursery() as stopping:
                for role in group:
                    if role.name in self._keepers:
                        stopping.start_soon(self._keepers[role.name].stop)
            if self._roles.mount in group and MOUNT in self._keepers:
                await trio.to_thread.run_sync(self._detach)
        self._home.remove_endpoints()
        self._home.remove_sockets()
        log.info("stopped")

    def _detach(self) -> None:
        """Also after an orderly end: a mount that was killed because it hung is still there."""
        if self._config.mountpoint is not None:
            mounts.detach(self._config.mountpoint)

    def _write_endpoints(self) -> None:
        if self._serving:
            self._home.write_endpoints(self._endpoints())

    def _endpoints(self) -> Endpoints:
        states = {name: keeper.state for name, keeper in self._keepers.items()}
        pids = {name: state.pid for name, state in states.items() if state.pid is not None}
        return Endpoints(
            metadata=str(self._roles.metadata.address),
            agent=str(self._roles.agent.address),
            chunk_servers=[str(role.address) for role in self._roles.chunk_servers],
            mount=self._config.mountpoint,
            supervisor_pid=os.getpid(),
            started_ns=self._started_ns,
            pids={"supervisor": os.getpid(), **pids},
            roles=states,
            secret_file=self._config.secret_file,
        )


def _is_serving(state: TargetState) -> bool:
    return state is not TargetState.OFFLINE
