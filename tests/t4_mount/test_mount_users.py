"""Mounts of users who are not root, through fusermount3; and who else may enter."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 (loaded before who cannot read it needs it)
import encodings.idna  # noqa: F401
import errno
import os
import pwd
import shutil
import signal
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from kvfs.mount import direct_frontend, main, pyfuse3_frontend, system
from kvfs.mount.config import MountConfig
from kvfs_base.os_env import os_env
from t4_mount.harness import Cluster, as_user, detach, wait_until

USER, OTHER = pwd.getpwnam("nobody").pw_uid, 4712
"""fusermount3 mounts for users that have a name."""

pytestmark = [
    pytest.mark.both_frontends,
    pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users"),
    pytest.mark.skipif(not shutil.which("fusermount3"), reason="fusermount3 is not installed"),
    pytest.mark.skipif(
        not os.stat(system.FUSE_DEVICE).st_mode & stat.S_IWOTH,
        reason="/dev/fuse is not for all users",
    ),
]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that all users reach, unlike pytest's."""
    directory = Path(tempfile.mkdtemp(prefix="kvfs-", dir="/var/tmp"))
    directory.chmod(0o755)
    yield directory
    detach(directory / "mnt")
    shutil.rmtree(directory)


@pytest.fixture
def open_cluster(place: Path) -> Iterator[Cluster]:
    """Its sockets are everybody's."""
    cluster = Cluster(place)
    (place / "run").chmod(0o755)
    for socket in (place / "run").glob("*.sock"):
        socket.chmod(0o777)
    yield cluster
    cluster.stop()


def mount_as_user(cluster: Cluster, mountpoint: Path, frontend: str) -> int:
    """The process; a copy of this one, since the user may not be able to read the sources."""
    assert direct_frontend and pyfuse3_frontend, "imported while that is allowed"
    config = MountConfig(str(mountpoint), (cluster.address,), frontend=frontend)
    child = os.fork()
    if child:
        return child
    try:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)

        async def serve() -> None:
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async with trio.open_nursery() as nursery:
                    await nursery.start(
                        lambda task_status: main.run_mount(
                            os_env(), config, task_status=task_status
                        )
                    )
                    await anext(aiter(signals))
                    nursery.cancel_scope.cancel()

        trio.run(serve)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def in_mount(uid: int, mountpoint: Path, action: Callable[[], object]) -> int:
    """As ``as_user``, which enters the directory while it is root: here root may not."""

    def act() -> None:
        os.chdir(mountpoint)
        action()

    return as_user(uid, mountpoint.parent, act)


def test_a_mount_of_a_user(open_cluster: Cluster, place: Path, frontend: str) -> None:
    with open_cluster.mounted(place / "root", "--allow-other"):
        shared = place / "root" / "shared"
        shared.mkdir()
        shared.chmod(0o777)
        mountpoint = place / "mnt"
        mountpoint.mkdir()
        os.chown(mountpoint, USER, USER)
        process = mount_as_user(open_cluster, mountpoint, frontend)
        try:
            wait_until(lambda: system.mounted_at(str(mountpoint)) is not None)
            assert not os.access(mountpoint / "shared", os.F_OK)  # not even for root

            def use() -> None:
                own = Path("shared/file")
                own.write_bytes(b"mine" * 1000)
                assert own.read_bytes() == b"mine" * 1000
                own.chmod(0o600)

            assert in_mount(USER, mountpoint, use) == 0
            assert (shared / "file").stat().st_uid == USER
            # Names that are root's are not the user's to change, though the mount is.
            assert in_mount(USER, mountpoint, Path("new").touch) == errno.EACCES
            assert in_mount(OTHER, mountpoint, lambda: os.listdir(".")) == errno.EACCES
        finally:
            os.kill(process, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        assert not os.path.ismount(mountpoint)
