"""The directory of `kvfs up`: format, locks, endpoints, sockets."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs.supervisor import locks
from kvfs.supervisor.home import SOCKET_PATH_BYTES_MAX, Endpoints, Home, RoleState
from kvfs_base.errors import AlreadyRunning, InvalidRequest, NotKvfsDirectory, VersionMismatch


def test_a_new_directory_has_three_chunk_servers_and_is_private(tmp_path: Path) -> None:
    home = Home(tmp_path / "a" / "b")
    made = home.open_or_create(0)
    assert (made.format, made.chunk_servers, len(made.cluster_id)) == (1, 3, 32)
    assert home.open() == made
    for path in (home.directory, home.run, home.log, home.target(2).parent, home.target(2)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_chunk_servers_may_be_added_but_not_removed(tmp_path: Path) -> None:
    home = Home(tmp_path / "kv")
    first = home.open_or_create(2)
    assert home.open_or_create(0).chunk_servers == 2
    grown = home.open_or_create(4)
    assert (grown.chunk_servers, grown.cluster_id) == (4, first.cluster_id)
    assert home.target(3).is_dir()
    with pytest.raises(InvalidRequest, match="has 4 chunk servers"):
        home.open_or_create(3)


def test_settings_may_lie_there_before_the_first_start(tmp_path: Path) -> None:
    (tmp_path / "kvfs.toml").write_text("[up]\n")
    home = Home(tmp_path)
    assert home.open_or_create(1).chunk_servers == 1
    assert home.settings_text() == "[up]\n"
    assert Home(tmp_path / "none").settings_text() == ""


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(NotKvfsDirectory) as caught:
        Home(tmp_path).open_or_create(0)
    assert caught.value.path == str(tmp_path)
    assert os.listdir(tmp_path) == ["letter.txt"]
    for path in (tmp_path / "letter.txt", tmp_path / "missing"):
        with pytest.raises(NotKvfsDirectory):
            Home(path).open()
    with pytest.raises(NotKvfsDirectory):
        Home(tmp_path / "letter.txt").open_or_create(0)


def test_another_format_version_is_refused_whatever_else_it_holds(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.open_or_create(1)
    (tmp_path / "kvfs.json").write_text(json.dumps({"format": 9, "news": True}))
    for attempt in (home.open, lambda: home.open_or_create(0)):
        with pytest.raises(VersionMismatch) as caught:
            attempt()
        assert (caught.value.found, caught.value.expected) == ("9", "1")
    (tmp_path / "kvfs.json").write_text("{")
    with pytest.raises(NotKvfsDirectory, match="damaged"):
        home.open()


def test_the_lock_tells_who_has_it_and_asking_does_not_take_it(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.running_pid() is None
    home.open_or_create(1)
    with home.locked("/mnt/x") as previous:
        assert previous is None
        assert home.running_pid() == os.getpid()
        assert home.noted_mount() == "/mnt/x"
        with pytest.raises(AlreadyRunning) as caught, Home(tmp_path).locked(None):
            pass
        assert caught.value.pid == os.getpid()
    assert home.running_pid() is None
    assert home.noted_mount() is None


def test_what_a_killed_supervisor_noted_is_found(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.open_or_create(1)
    (home.run / "supervisor.lock").write_text(json.dumps({"pid": 1, "mount": "/mnt/old"}))
    assert home.running_pid() is None
    with home.locked("/mnt/new") as previous:
        assert previous == "/mnt/old"
    (home.run / "supervisor.lock").write_text("[nonsense")
    with home.locked(None) as previous:
        assert previous is None


def test_a_lock_lives_as_long_as_a_duplicate_of_its_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open("r+b") as other:
        with path.open("r+b") as mine:
            assert locks.acquire(mine.fileno())
            assert not locks.acquire(other.fileno())
            duplicate = os.dup(mine.fileno())
        assert locks.is_held(other.fileno())
        os.close(duplicate)
        assert not locks.is_held(other.fileno())
        assert locks.acquire(other.fileno())
    assert locks.holders(path) == []


def test_endpoints_come_back_as_written_and_damage_is_absence(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.open_or_create(1)
    assert home.read_endpoints() is None
    endpoints = Endpoints(
        metadata="unix:/m",
        agent="unix:/a",
        chunk_servers=["unix:/c"],
        mount=None,
        supervisor_pid=1,
        started_ns=2,
        pids={"supervisor": 1},
        roles={"agent": RoleState(pid=3, state="serving")},
    )
    home.write_endpoints(endpoints)
    assert home.read_endpoints() == endpoints
    assert json.loads((home.run / "endpoints.json").read_text())["format"] == 1
    (home.run / "endpoints.json").write_text("{")
    assert home.read_endpoints() is None
    home.remove_endpoints()
    home.remove_endpoints()


@pytest.fixture
def runtime_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """With a shorter name than pytest's."""
    with tempfile.TemporaryDirectory(prefix="kvfs-") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        yield Path(name)


def test_sockets_of_a_long_directory_get_a_short_one(
    tmp_path: Path, runtime_directory: Path
) -> None:
    short = Home("/a")
    assert short.sockets() == short.run
    long = Home(tmp_path / ("d" * 100))
    sockets = long.sockets()
    assert sockets.parent == runtime_directory
    assert sockets == long.sockets()
    assert sockets != Home(tmp_path / ("e" * 100)).sockets()
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert len(os.fsencode(sockets / "chunks-00.sock")) <= SOCKET_PATH_BYTES_MAX
    long.remove_sockets()
    assert not sockets.exists()
    short.remove_sockets()
    long.sockets().chmod(0o755)
    with pytest.raises(NotKvfsDirectory, match="ours alone"):
        long.sockets()
