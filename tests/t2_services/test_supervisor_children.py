"""Children of the supervisor: ready line, logs, crashes, restarts, stopping. The children are small
scripts, so that each case happens for sure."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import ParamSpec

import pytest
import trio

from kvfs.supervisor import supervise
from kvfs.supervisor.child import PARENT_VARIABLE, Child, RotatingLog
from kvfs.supervisor.config import UpConfig
from kvfs.supervisor.home import Home
from kvfs.supervisor.roles import Role, plan
from kvfs.supervisor.supervise import _Keeper
from kvfs_base.errors import InvalidRequest, RoleFailed

READY = 'print(\'{"event": "ready"}\', flush=True)\n'
WAIT = "import signal; signal.pause()\n"
DEADLINE_SECONDS = 60.0


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[RotatingLog]:
    log = RotatingLog(tmp_path / "role.log", limit=1 << 16)
    yield log
    log.close()


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[int]:
    with (tmp_path / "lock").open("wb") as file:
        yield file.fileno()


P = ParamSpec("P")


def in_trio(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        trio.run(functools.partial(test, *args, **kwargs))

    return run


def argv(script: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", script)


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@in_trio
async def test_ready_line_log_and_end(log_file: RotatingLog, lock: int, tmp_path: Path) -> None:
    script = (
        f"import os; parent, lock = os.environ[{PARENT_VARIABLE!r}], os.fstat({lock}).st_ino\n"
        f"os.write(2, f'{{parent}} {{lock}}\\n'.encode())\n{READY}{WAIT}"
    )
    with trio.fail_after(DEADLINE_SECONDS):
        async with trio.open_nursery() as nursery:
            child = Child("x", argv(script), log_file, lock)
            nursery.start_soon(child.run)
            assert await child.wait_ready(DEADLINE_SECONDS) == {"event": "ready"}
            assert os.getsid(child.pid) == child.pid
            assert await child.stop(DEADLINE_SECONDS)
    assert child.exit_code == -signal.SIGTERM
    assert has_ended(child.pid)
    logged = (tmp_path / "role.log").read_text()
    assert logged == f"{os.getpid()} {os.fstat(lock).st_ino}\n"
    child.signal(signal.SIGKILL)  # of an ended process: nobody is hit


@in_trio
async def test_a_child_that_ends_before_it_is_ready(log_file: RotatingLog, lock: int) -> None:
    script = "import sys; print('no\\nkvfs: the reason', file=sys.stderr); sys.exit(7)"
    with trio.fail_after(DEADLINE_SECONDS):
        async with trio.open_nursery() as nursery:
            child = Child("x", argv(script), log_file, lock)
            nursery.start_soon(child.run)
            with pytest.raises(RoleFailed) as caught:
                await child.wait_ready(DEADLINE_SECONDS)
    assert (caught.value.exit_code, caught.value.detail) == (7, "kvfs: the reason")


@in_trio
async def test_a_child_that_ended_and_was_signalled_before_anybody_waits(
    log_file: RotatingLog, lock: int
) -> None:
    child = Child("x", argv("raise SystemExit(3)"), log_file, lock)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    child.signal(signal.SIGTERM)
    assert has_ended(child.pid)  # nothing is left of it but its exit code
    with trio.fail_after(DEADLINE_SECONDS):
        await child.run()
    assert child.exit_code == 3


@in_trio
async def test_a_child_that_is_never_ready_and_ignores_sigterm(
    log_file: RotatingLog, lock: int
) -> None:
    script = (
        "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"print('no json', flush=True)\n{WAIT}"
    )
    with trio.fail_after(DEADLINE_SECONDS):
        async with trio.open_nursery() as nursery:
            child = Child("x", argv(script), log_file, lock)
            nursery.start_soon(child.run)
            while b"no json" not in log_file.tail:
                await trio.sleep(0.01)
            with pytest.raises(RoleFailed, match="not ready after"):
                await child.wait_ready(0.01)
            assert not await child.stop(0.01)
    assert child.exit_code == -signal.SIGKILL


def test_logs_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    log = RotatingLog(path, limit=1000)
    for number in range(100):
        log.write(f"line {number:03d} {'x' * 50}\n".encode())
    assert log.last_line().startswith("line 099")
    log.close()
    older = tmp_path / "x.log.1"
    assert 0 < path.stat().st_size <= 1000
    assert 0 < older.stat().st_size <= 1000
    assert (older.read_text() + path.read_text()).splitlines()[-1].startswith("line 099")
    assert sorted(os.listdir(tmp_path)) == ["x.log", "x.log.1"]


def keeper(script: str, log_file: RotatingLog, lock: int) -> _Keeper:
    config = UpConfig(directory="/x", ready_seconds=DEADLINE_SECONDS, stop_seconds=DEADLINE_SECONDS)
    role = Role("x", argv(script), None)
    return _Keeper(role, config, log_file, lock)


@pytest.mark.logs_warnings
@in_trio
async def test_a_role_that_crashes_is_started_again(
    log_file: RotatingLog, lock: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "BACKOFF_SECONDS_MIN", 0.01)
    changes: list[tuple[str, bool]] = []
    with trio.fail_after(DEADLINE_SECONDS):
        async with trio.open_nursery() as nursery:
            kept = keeper(READY + WAIT, log_file, lock)
            seen = trio.Event()

            def changed() -> None:
                changes.append((kept.state.state, kept.state.pid is not None))
                seen.set()

            await nursery.start(kept.run, nursery, changed)
            first = kept.state.pid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            while kept.state.restarts < 1 or kept.state.state != "serving":
                seen = trio.Event()
                await seen.wait()
            assert kept.state.pid not in (None, first)
            await kept.stop()
    assert changes == [("serving", True), ("restarting", False), ("serving", True)]
    assert kept.state.restarts == 1


@pytest.mark.logs_warnings
@in_trio
async def test_a_role_that_cannot_come_back_is_tried_again_until_it_is_stopped(
    log_file: RotatingLog, lock: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(supervise, "BACKOFF_SECONDS_MIN", 0.01)
    monkeypatch.setattr(supervise, "BACKOFF_SECONDS_MAX", 0.01)
    flag = tmp_path / "started"
    script = (
        f"import os, sys\nif os.path.exists({str(flag)!r}): sys.exit(3)\n"
        f"open({str(flag)!r}, 'w').close()\n{READY}"
    )
    with trio.fail_after(DEADLINE_SECONDS):
        async with trio.open_nursery() as nursery:
            kept = keeper(script, log_file, lock)
            await nursery.start(kept.run, nursery, lambda: None)
            while kept.state.restarts < 3:
                await trio.sleep(0.01)
            await kept.stop()
    assert kept.state.pid is None or has_ended(kept.state.pid)


@in_trio
async def test_a_first_start_that_fails_is_not_tried_again(
    log_file: RotatingLog, lock: int
) -> None:
    with trio.fail_after(DEADLINE_SECONDS):
        async with trio.open_nursery() as nursery:
            kept = keeper("raise SystemExit(4)", log_file, lock)
            with pytest.raises(RoleFailed) as caught:
                await nursery.start(kept.run, nursery, lambda: None)
            await kept.stop()
    assert caught.value.exit_code == 4


@in_trio
async def test_a_program_that_is_missing(log_file: RotatingLog, lock: int) -> None:
    kept = keeper("", log_file, lock)
    kept.role = Role("x", ("/nonexistent/program",), None)
    async with trio.open_nursery() as nursery:
        with pytest.raises(RoleFailed, match="cannot start"):
            await nursery.start(kept.run, nursery, lambda: None)
        await kept.stop()


def test_the_plan_names_every_process_and_passes_flags_on(tmp_path: Path) -> None:
    home = Home(tmp_path)
    config = UpConfig(directory=str(tmp_path), mountpoint="/mnt/x")
    overrides = {"metadata": {"capacity_bytes": "5"}, "chunks": {"durability": "strict"}}
    roles = plan(home, config, 2, overrides)
    groups = [[role.name for role in group] for group in roles.in_stop_order()]
    assert groups == [["mount"], ["agent"], ["chunks-0", "chunks-1"], ["metadata"]]
    assert "--capacity-bytes=5" in roles.metadata.argv
    assert all("--durability=strict" in role.argv for role in roles.chunk_servers)
    assert not any("--config" in word for word in roles.agent.argv)
    (tmp_path / "kvfs.toml").touch()
    assert f"--config={tmp_path}/kvfs.toml" in plan(home, config, 2, overrides).agent.argv
    assert plan(home, UpConfig(directory="/x"), 1, {}).mount is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"directory": "x"},
        {"chunk_servers": -1},
        {"chunk_servers": 65},
        {"ready_seconds": 0.0},
        {"stop_seconds": 1e9},
        {"log_bytes": 1},
        {"mountpoint": "here"},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        UpConfig(**{"directory": "/x", **wrong})  # type: ignore[arg-type]
