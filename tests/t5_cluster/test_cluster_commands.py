"""What users see: API and mount, the commands for files and blocks, errors and exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import kvfs
from kvfs.cli.exits import ExitCode
from t5_cluster.processes import KVFS, Cluster, block, run, wait_until


def test_a_block_put_through_the_api_is_a_file_in_the_mount(running: Cluster) -> None:
    with kvfs.connect(running.directory) as client:
        running.put(client, range(8))
        running.check_api(client, range(8))
    running.check_mount(range(8))
    names = {path.name for path in (running.mountpoint / "kv/tenant/model").iterdir()}
    assert {block(n)[0].hex() for n in range(8)} <= names


def test_status_tells_programs_and_people(running: Cluster) -> None:
    with kvfs.connect(running.directory) as client:
        running.put(client, [100])
    found = json.loads(run("status", running.directory, "--json").stdout)
    assert found["healthy"] is True
    assert found["errors"] == []
    assert found["mount"] == str(running.mountpoint)
    assert set(found["roles"]) == {"metadata", "chunks-0", "chunks-1", "chunks-2", "agent", "mount"}
    assert {role["state"] for role in found["roles"].values()} == {"serving"}
    assert [target["state"] for target in found["targets"]] == ["serving"] * 3
    assert found["capacity_bytes"] == 1 << 30
    assert found["used_bytes"] >= 64 * 1024
    assert found["metadata"]["blocks"] >= 1
    assert found["agent"]["put_blocks"] >= 1
    servers = found["chunk_servers"]
    assert set(servers) == {"chunks-0", "chunks-1", "chunks-2"}
    assert sum(figures["chunks_written"] for figures in servers.values()) >= 1
    assert found["uptime_seconds"] > 0
    endpoints = running.endpoints()
    assert endpoints["format"] == 1
    assert set(endpoints["pids"]) == {"supervisor", *found["roles"]}
    assert len(endpoints["chunk_servers"]) == 3
    told = run("status", running.directory)
    assert told.returncode == ExitCode.OK
    assert b"healthy" in told.stdout
    assert b"chunks-2" in told.stdout
    assert b"heartbeats" in told.stdout


def test_everything_is_private_and_logged(running: Cluster) -> None:
    for path in running.directory.rglob("*"):
        if path.is_dir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
        elif stat.S_ISSOCK(path.stat().st_mode):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    log = (running.directory / "log/supervisor.log").read_text()
    assert "agent is serving" in log


def test_files_without_a_mount(running: Cluster, tmp_path: Path) -> None:
    kv = running.directory
    data = os.urandom(3_000_000)
    source = tmp_path / "source"
    source.write_bytes(data)
    (running.mountpoint / "files").mkdir()
    assert run("put", kv, source, "/files/a").returncode == ExitCode.OK
    assert (running.mountpoint / "files/a").read_bytes() == data
    assert run("put", kv, "-", "files/b", input=b"from a pipe").returncode == ExitCode.OK
    assert run("put", kv, "-", "/files/b", input=b"replaced").returncode == ExitCode.OK
    assert run("put", kv, source, "/files").returncode == ExitCode.OK
    (running.mountpoint / "files/link").symlink_to("../files/b")
    assert run("ls", kv, "/files").stdout.split() == [b"a", b"b", b"link", b"source"]
    assert run("cat", kv, "/files/b", "/files/link").stdout == b"replacedreplaced"
    assert run("get", kv, "/files/a", tmp_path / "copy").returncode == ExitCode.OK
    assert (tmp_path / "copy").read_bytes() == data
    assert run("get", kv, "/files/b", tmp_path).returncode == ExitCode.OK
    assert (tmp_path / "b").read_bytes() == b"replaced"
    assert run("get", kv, "/files/b", "-").stdout == b"replaced"
    found = json.loads(run("stat", kv, "/files/a", "--json").stdout)
    assert (found["type"], found["size"]) == ("file", len(data))
    assert json.loads(run("stat", kv, "/files/link", "--json").stdout)["target"] == "../files/b"
    assert b"3000000" in run("ls", "-l", kv, "/files").stdout
    refused = run("rm", kv, "/files")
    assert (refused.returncode, b"DirectoryNotEmpty" in refused.stderr) == (ExitCode.FAILED, True)
    assert run("rm", kv, "/files/a", "/files/link").returncode == ExitCode.OK
    assert run("rm", "-r", kv, "/files").returncode == ExitCode.OK
    assert not (running.mountpoint / "files").exists()
    missing = run("cat", kv, "/files/a")
    assert missing.returncode == ExitCode.NOT_FOUND
    assert missing.stderr == b"kvfs: no such file or block: /files/a\n"
    assert run("rm", kv, "-f", "/files/a").returncode == ExitCode.OK
    assert not list(tmp_path.glob(".kvfs-get-*"))


def test_blocks_without_a_mount(running: Cluster, tmp_path: Path) -> None:
    kv = running.directory
    key, data = block(200)
    path = f"/kv/cli/model/{key.hex()}"
    assert run("put", kv, "-", path, input=data).returncode == ExitCode.NOT_FOUND
    put = run("put", kv, "-", path, "--block-tokens", 16, input=data)
    assert put.returncode == ExitCode.OK, put.stderr
    assert run("put", kv, "-", path, input=b"other bytes").returncode == ExitCode.OK
    metadata = running.endpoints()["metadata"]
    assert run("cat", metadata, path).stdout == data
    assert run("get", kv, path, tmp_path / "block").returncode == ExitCode.OK
    assert (tmp_path / "block").read_bytes() == data
    found = json.loads(run("stat", kv, path, "--json").stdout)
    assert (found["type"], found["key"], found["size"]) == ("block", key.hex(), len(data))
    assert run("ls", kv, "/kv/cli/model").stdout.decode().split() == [key.hex()]
    assert run("rm", kv, path).returncode == ExitCode.OK
    assert run("cat", kv, path).returncode == ExitCode.NOT_FOUND
    refused = run("put", metadata, "-", path, input=data)
    assert (refused.returncode, b"must be a directory" in refused.stderr) == (ExitCode.USAGE, True)


def test_flipped_bytes_are_a_miss_and_counted(running: Cluster) -> None:
    with kvfs.connect(running.directory) as client:
        running.put(client, [300, 301])
    for number in (300, 301):
        inode = running.block_path(block(number)[0]).stat().st_ino
        (file,) = running.chunk_files(inode)
        content = bytearray(file.read_bytes())
        content[12345] ^= 1
        file.write_bytes(content)
    # What the agent and the chunk servers have verified before they need not look at again.
    for role in ("agent", "chunks-0", "chunks-1", "chunks-2"):
        os.kill(running.pids()[role], signal.SIGKILL)
    wait_until(lambda: all_serve_again(running), "agent and chunk servers")
    with kvfs.connect(running.directory) as client:
        key = block(300)[0]
        with client.namespace("tenant/model").get([key]) as blocks:
            assert list(blocks) == [None]
        assert client.namespace("tenant/model").match([key]) == 0
    assert running.status()["agent"]["blocks_corrupt"] == 1
    path = f"/kv/tenant/model/{block(301)[0].hex()}"
    damaged = run("cat", running.directory, path)
    assert (damaged.returncode, damaged.stdout) == (ExitCode.DAMAGED, b"")
    assert run("cat", running.directory, path).returncode == ExitCode.NOT_FOUND


def all_serve_again(running: Cluster) -> bool:
    found = running.status()
    restarted = [found["roles"][name]["restarts"] for name in ("agent", "chunks-0", "chunks-2")]
    return min(restarted) >= 1 and bool(found["healthy"])


# --- errors


def check(done: subprocess.CompletedProcess[bytes], code: ExitCode, *parts: str) -> None:
    """One line that says what is wrong, and its exit code."""
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert text.startswith("kvfs: ")
    assert text.count("\n") == 1, text
    for part in parts:
        assert part in text


def test_a_second_up_says_who_runs(running: Cluster) -> None:
    pid = running.pids()["supervisor"]
    done = run("up", running.directory)
    check(done, ExitCode.ALREADY_RUNNING, f"(pid {pid})", "kvfs down")
    check(run("up", running.directory, "--detach"), ExitCode.ALREADY_RUNNING)
    assert running.status()["healthy"]


def test_busy_mount_points(running: Cluster, tmp_path: Path) -> None:
    kv = tmp_path / "kv"
    taken = run("up", kv, "--mount", running.mountpoint)
    check(taken, ExitCode.MOUNT_BUSY, "fuse.kvfs", str(running.mountpoint))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    full = run("up", kv, "--mount", tmp_path / "full", "--detach")
    assert (full.returncode, b"not empty" in full.stderr) == (ExitCode.MOUNT_BUSY, True)
    again = run("mount", running.directory, running.mountpoint)
    check(again, ExitCode.MOUNT_BUSY, "fuse.kvfs")
    running.check_mount([])
    assert running.is_mounted()


def test_directories_that_are_no_kvfs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check(run("up", tmp_path), ExitCode.NOT_KVFS, str(tmp_path))
    check(run("down", tmp_path / "none"), ExitCode.NOT_KVFS, "no such directory")
    check(run("status", tmp_path / "file"), ExitCode.NOT_KVFS, "not a directory")
    check(run("ls", tmp_path), ExitCode.NOT_KVFS)


def test_another_format_version(tmp_path: Path) -> None:
    (tmp_path / "kvfs.json").write_text('{"format": 2}')
    for command in ("up", "down", "status", "ls"):
        check(run(command, tmp_path), ExitCode.VERSION, "format 2")


def test_a_server_that_is_not_there_is_passed_over(running: Cluster, tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/nobody,{running.endpoints()['metadata']}"
    (tmp_path / "file").write_bytes(b"hello")
    assert run("put", target, tmp_path / "file", "/passed-over").returncode == 0
    assert run("cat", target, "/passed-over").stdout == b"hello"
    assert run("rm", target, "/passed-over").returncode == 0
    assert run("ls", f"{target},nowhere").returncode == ExitCode.USAGE


def test_what_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "kvfs.json").write_text('{"format": 1, "chunk_servers": 1}')
    for command in ("down", "status", "ls"):
        check(run(command, tmp_path), ExitCode.NOT_RUNNING, "kvfs up")
    nowhere = f"unix:{tmp_path}/none.sock"
    check(run("mount", nowhere, tmp_path / "mnt"), ExitCode.MOUNT_BUSY, "does not exist")
    check(run("serve", "metadata"), ExitCode.USAGE, "metadata.directory is not set")


def test_wrong_settings_name_the_culprit(tmp_path: Path) -> None:
    environment = {**os.environ, "KVFS_AGENT_COLOUR": "red"}
    done = run("up", tmp_path / "kv", "--detach", env=environment)
    check(done, ExitCode.USAGE, "agent did not start", "KVFS_AGENT_COLOUR: no such setting")
    (tmp_path / "kv/kvfs.toml").write_text("[up]\nchunk_servers = 'many'\n")
    check(run("up", tmp_path / "kv"), ExitCode.USAGE, "up.chunk_servers: not a number")
    assert run("up", tmp_path / "kv", "--arena", "huge").returncode == ExitCode.USAGE


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        tcp = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
        flags = [f"--directory={tmp_path}", f"--unix=unix:{tmp_path}/m.sock", f"--tcp={tcp}"]
        check(run("serve", "metadata", *flags), ExitCode.ADDRESS_IN_USE, tcp)
    flags[-1] = "--tcp=tcp:0.0.0.0:0"
    assert run("serve", "metadata", *flags).returncode == ExitCode.USAGE


def test_a_secret_is_made_once_and_checked(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    assert run("secret", secret).returncode == ExitCode.OK
    made = secret.read_bytes()
    assert len(bytes.fromhex(made.decode())) == 32
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    check(run("secret", secret), ExitCode.FAILED, "File exists")
    assert secret.read_bytes() == made
    flags = [f"--directory={tmp_path}/m", f"--unix=unix:{tmp_path}/m.sock"]
    secret.chmod(0o640)
    for command in (
        ("serve", "metadata", *flags, f"--secret-file={secret}"),
        ("ls", "tcp:192.0.2.1:1", f"--secret-file={secret}"),
        ("up", tmp_path / "kv", f"--secret-file={secret}"),
    ):
        check(run(*command), ExitCode.USAGE, str(secret), "chmod 600")
    secret.chmod(0o600)
    wildcard = (
        "serve",
        "chunks",
        "--server-id=x",
        f"--directories={tmp_path}",
        "--metadata=unix:/m",
    )
    check(
        run(*wildcard, "--tcp=tcp:0.0.0.0:0", f"--secret-file={secret}"),
        ExitCode.USAGE,
        "name one that they can reach",
    )


def test_a_cluster_with_a_secret(own: Cluster, tmp_path: Path) -> None:
    """Over TCP only who has it gets in; by the directory it is found, sockets need none."""
    for name in ("secret", "other"):
        assert run("secret", tmp_path / name).returncode == ExitCode.OK
    with socket.create_server(("127.0.0.1", 0)) as free:
        tcp = f"tcp:127.0.0.1:{free.getsockname()[1]}"
    own.directory.mkdir()
    (own.directory / "kvfs.toml").write_text(f'[metadata]\ntcp = "{tcp}"\n')
    own.up(f"--secret-file={tmp_path}/secret")
    assert own.endpoints()["secret_file"] == str(tmp_path / "secret")
    with kvfs.connect(own.directory) as client:
        own.put(client, [1])
    own.check_mount([1])
    assert run("ls", own.directory).stdout == b"kv\n"
    right = f"--secret-file={tmp_path}/secret"
    assert run("ls", tcp, right).stdout == b"kv\n"
    environment = {**os.environ, "KVFS_SECRET_FILE": f"{tmp_path}/secret"}
    assert run("cluster", "targets", tcp, "--json", env=environment).returncode == ExitCode.OK
    assert run("fsck", tcp, right).returncode == ExitCode.OK
    check(run("ls", tcp, f"--secret-file={tmp_path}/other"), ExitCode.REFUSED, "another secret")
    check(run("ls", tcp), ExitCode.REFUSED, "asks for a secret", "--secret-file")
    own.down()
    own.assert_gone()


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    done = run("down", tmp_path, "--debug")
    assert b"Traceback" in done.stderr
    assert b"NotKvfsDirectory" in done.stderr


def test_help_costs_no_services_and_version_is_told() -> None:
    script = (
        "import sys; from kvfs.cli import cli; cli.main(['--help'], standalone_mode=False)\n"
        "sys.exit(any(name in sys.modules for name in ('lmdb', 'pyfuse3', 'torch', 'cupy')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert b"Start a whole kvfs" in done.stdout
    assert run("version").stdout.startswith(b"kvfs 0.")
    assert run("frobnicate").returncode == ExitCode.USAGE


def test_a_reader_that_has_seen_enough(running: Cluster) -> None:
    with kvfs.connect(running.directory) as client:
        running.put(client, [400])
    path = f"/kv/tenant/model/{block(400)[0].hex()}"
    arguments = [*KVFS, "cat", str(running.directory), *[path] * 16]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == ExitCode.OK


@pytest.mark.parametrize("role", ["metadata", "chunks", "agent"])
def test_a_role_alone_says_when_it_is_ready_and_stops_on_sigterm(
    role: str, tmp_path: Path, running: Cluster
) -> None:
    (tmp_path / "target").mkdir()
    metadata = f"--metadata={running.endpoints()['metadata']}"
    if role == "chunks":
        # Not the running one's: this server's target shall not be counted there.
        metadata = f"--metadata=unix:{tmp_path}/nobody.sock"
    flags = {
        "metadata": [f"--directory={tmp_path}/target"],
        "chunks": [metadata, "--server-id=x", f"--directories={tmp_path}/target"],
        "agent": [metadata, "--arena-bytes=16M"],
    }
    arguments = [*KVFS, "serve", role, f"--unix=unix:{tmp_path}/x.sock", *flags[role]]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        line = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == b""
    assert process.returncode == 0
    assert line == {
        "event": "ready",
        "role": role,
        "pid": process.pid,
        "addresses": [f"unix:{tmp_path}/x.sock"],
    }
    assert not (tmp_path / "x.sock").exists()
