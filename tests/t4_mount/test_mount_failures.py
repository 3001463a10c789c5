"""What is left of the mount's promises when processes die."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvfs_base.limits import FILE_CHUNK_BYTES, MIB
from kvfs_metadata.messages import GetQuota, Resolve
from metadata_checks import assert_consistent
from t4_mount.harness import Cluster, detach, wait_until
from t4_mount.test_mount_quotas import set_quota, used


def is_dead(mountpoint: Path) -> bool:
    try:
        mountpoint.stat()
    except OSError as exc:
        return exc.errno == errno.ENOTCONN
    return False


@pytest.mark.both_frontends
def test_mounting_over_a_killed_mount(hasty_cluster: Cluster) -> None:
    mountpoint = hasty_cluster.directory / "mnt"
    role = hasty_cluster.mount(mountpoint)
    closed = os.urandom(3_000_000)
    (mountpoint / "closed").write_bytes(closed)
    (mountpoint / "synced").write_bytes(b"old")  # the kernel goes on with a new one by itself
    synced = (mountpoint / "synced").open("r+b", buffering=0)
    synced.write(b"synced")
    os.fsync(synced.fileno())
    synced.write(b" and not")
    role.kill()
    wait_until(lambda: is_dead(mountpoint))
    with pytest.raises(OSError):
        synced.write(b"x")
    with pytest.raises(OSError):
        synced.close()

    with hasty_cluster.mounted(mountpoint):
        mounts = Path("/proc/self/mountinfo").read_text().count(f" {mountpoint} ")
        assert mounts == 1  # the dead one was removed, not covered
        assert (mountpoint / "closed").read_bytes() == closed
        assert (mountpoint / "synced").read_bytes()[:6] == b"synced"
        # Bytes that were written behind the recorded end do not show in a hole.
        os.truncate(mountpoint / "synced", 100)
        assert (mountpoint / "synced").read_bytes()[6:] == bytes(94)


def test_hole_over_what_a_killed_mount_left(hasty_cluster: Cluster) -> None:
    mountpoint = hasty_cluster.directory / "mnt"
    role = hasty_cluster.mount(mountpoint)
    file = (mountpoint / "file").open("wb", buffering=0)
    file.write(b"begin")
    os.fsync(file.fileno())
    file.write(b"lost" * 1_000_000)
    role.kill()
    with pytest.raises(OSError):
        file.close()
    with hasty_cluster.mounted(mountpoint):
        with (mountpoint / "file").open("r+b", buffering=0) as again:
            os.pwrite(again.fileno(), b"end", 2_000_000)
            data = os.pread(again.fileno(), 3_000_000, 0)
        assert data == b"begin" + bytes(2_000_000 - 5) + b"end"


def test_the_mount_goes_on_after_the_metadata_service_was_killed(own_cluster: Cluster) -> None:
    mountpoint = own_cluster.directory / "mnt"
    with own_cluster.mounted(mountpoint):
        (mountpoint / "before").write_bytes(b"before")
        opened = (mountpoint / "open").open("w+b", buffering=0)
        opened.write(b"held ")
        # Nothing is left to record: the child that becomes the service first closes its copies of
        # our descriptors.
        os.fsync(opened.fileno())
        gone = (mountpoint / "gone").open("w+b", buffering=0)
        gone.write(b"unlinked but open")
        os.fsync(gone.fileno())
        (mountpoint / "gone").unlink()

        own_cluster.metadata.kill()
        waiting = threading.Thread(target=(mountpoint / "waited").write_bytes, args=(b"waited",))
        waiting.start()
        wait_until(lambda: waiting.is_alive())
        own_cluster.metadata.start()
        waiting.join(60)
        assert not waiting.is_alive()

        assert (mountpoint / "waited").read_bytes() == b"waited"
        assert (mountpoint / "before").read_bytes() == b"before"
        opened.write(b"after")
        opened.close()
        assert (mountpoint / "open").read_bytes() == b"held after"
        assert os.pread(gone.fileno(), 100, 0) == b"unlinked but open"
        gone.close()


def test_a_program_at_work_survives_restarts_of_the_metadata_service(
    own_cluster: Cluster,
) -> None:
    mountpoint = own_cluster.directory / "mnt"
    program = (
        "import os, sys\n"
        "root, stop, progress = sys.argv[1:]\n"
        "n = 0\n"
        "while not os.path.exists(stop):\n"
        "  path = f'{root}/{n % 20}'\n"
        "  with open(path + '.tmp', 'w') as f: f.write(f'number {n}' * 100)\n"
        "  os.rename(path + '.tmp', path)\n"
        "  assert open(path).read() == f'number {n}' * 100\n"
        "  if n % 3 == 0: os.unlink(path)\n"
        "  n += 1\n"
        "  open(progress, 'a').write('x')\n"
    )
    stop, progress = own_cluster.directory / "stop", own_cluster.directory / "progress"
    progress.touch()
    with own_cluster.mounted(mountpoint):
        worker = subprocess.Popen(
            [sys.executable, "-c", program, mountpoint, stop, progress],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            for round_number in range(1, 4):
                done = 20 * round_number
                wait_until(lambda done=done: progress.stat().st_size >= done, 20)
                own_cluster.metadata.kill()
                own_cluster.metadata.start()
        finally:
            stop.touch()
            _, err = worker.communicate(timeout=60)
        assert worker.returncode == 0, err


@pytest.mark.logs_warnings
def test_a_dead_chunk_server_is_an_error_and_a_restart_heals(own_cluster: Cluster) -> None:
    mountpoint = own_cluster.directory / "mnt"
    data = os.urandom(2 * FILE_CHUNK_BYTES)
    with own_cluster.mounted(mountpoint, "--transport=tcp"):
        (mountpoint / "file").write_bytes(data)
        own_cluster.chunks.stop()
        descriptor = os.open(mountpoint / "file", os.O_RDONLY | os.O_DIRECT)
        try:
            with pytest.raises(OSError) as caught:
                os.pread(descriptor, 4096, 0)
            assert caught.value.errno in (errno.EIO, errno.ETIMEDOUT)
        finally:
            os.close(descriptor)
        own_cluster.chunks.start()
        wait_until(lambda: readable(mountpoint / "file", data), 30)


def readable(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


@pytest.mark.both_frontends
def test_closing_time_with_open_files(own_cluster: Cluster) -> None:
    mountpoint = own_cluster.directory / "mnt"
    role = own_cluster.mount(mountpoint)
    file = (mountpoint / "file").open("wb", buffering=0)
    file.write(b"kept")
    role.stop()  # busy: detached
    assert not os.path.ismount(mountpoint)
    with pytest.raises(OSError):
        file.write(b"too late")
    with pytest.raises(OSError):
        file.close()
    with own_cluster.mounted(mountpoint):
        assert (mountpoint / "file").read_bytes() == b"kept"


@pytest.mark.both_frontends
def test_two_mounts_see_each_other_close_to_open(own_cluster: Cluster) -> None:
    first, second = own_cluster.directory / "mnt", own_cluster.directory / "mnt2"
    try:
        with own_cluster.mounted(first), own_cluster.mounted(second):
            for round_number in range(3):
                for writer, reader in ((first, second), (second, first)):
                    data = f"{round_number} {writer}".encode() * (500 * (3 - round_number))
                    (writer / "file").write_bytes(data)
                    with (reader / "file").open("rb") as file:
                        assert file.read() == data
                        assert os.fstat(file.fileno()).st_size == len(data)
            with (second / "file").open("rb"):
                # Open there, not written there: the other mount's changes come through.
                (first / "file").chmod(0o611)
                wait_until(lambda: (second / "file").stat().st_mode & 0o777 == 0o611)
            (first / "file").unlink()
            with (second / "other").open("wb") as file:
                file.write(b"x")
            assert (first / "other").read_bytes() == b"x"
    finally:
        detach(second)


def test_quotas_are_exact_after_kills(hasty_cluster: Cluster) -> None:
    """The mount dies and comes again, the metadata service too, while files come, grow and go."""
    mountpoint = hasty_cluster.directory / "mnt"
    mount = hasty_cluster.mount(mountpoint)
    limited = mountpoint / "limited"
    limited.mkdir()
    set_quota(hasty_cluster, limited, 8 * MIB)
    stop = threading.Event()

    def work(number: int) -> None:
        rng = random.Random(number)
        while not stop.is_set():
            path = limited / f"{number}-{rng.randrange(3)}"
            with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
                file.write(bytes(rng.randrange(1, MIB)))
                if rng.random() < 0.3:
                    file.truncate(rng.randrange(MIB))
            if rng.random() < 0.3:
                with contextlib.suppress(OSError):
                    path.unlink()

    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(work, number) for number in range(3)]
        with hasty_cluster.client() as client:
            wait_until(lambda: client.call(GetQuota(quota_of(client))).bytes_used > MIB)
            mount.kill()
            mount = hasty_cluster.mount(mountpoint)
            hasty_cluster.metadata.kill()
            hasty_cluster.metadata.start()
        stop.set()
        for worker in workers:
            worker.result()
    sizes = [path.stat().st_size for path in limited.iterdir()]
    assert sum(sizes) <= used(hasty_cluster, limited) <= 8 * MIB  # orphans of the dead count
    mount.stop()
    hasty_cluster.chunks.stop()
    hasty_cluster.metadata.stop()
    assert_consistent(str(hasty_cluster.directory / "metadata"))


def quota_of(client: Any) -> int:
    inode: int = client.call(Resolve(b"/limited")).inode
    return inode
