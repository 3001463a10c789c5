"""`kvfs demo` as people run it: what it says, what it exits with, and that nothing is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvfs_tools.demo import demo
from kvfs_tools.generator import GeneratorConfig, generate, trace
from kvfs_tools.traces import read_trace, write_trace

needs_fuse = pytest.mark.skipif(
    not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root"
)

SMALL = ["--requests", "12", "--block-size", "16K", "--capacity", "64M", "--seconds", "30"]


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvfs", "demo", *arguments],
        env=os.environ | {"TMPDIR": str(tmp_path), "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_nothing_left(tmp_path: Path) -> None:
    assert list(tmp_path.glob("kvfs-demo-*")) == []
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert str(tmp_path).encode() not in path.read_bytes(), path
        except (FileNotFoundError, ProcessLookupError):
            continue


@needs_fuse
def test_a_trace_is_replayed_and_everything_cleared(tmp_path: Path) -> None:
    requests = generate(GeneratorConfig(requests=12))
    write_trace(tmp_path / "trace.jsonl", requests)
    process = start(tmp_path, *SMALL, "--trace", str(tmp_path / "trace.jsonl"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "Requests         12 of 12" in output
    assert "Wrong blocks     0" in output
    read_back = re.search(r"Through mount    (\d+) blocks read as files, 0 differ", output)
    assert read_back and int(read_back[1]) > 0
    for command in ("$ ls -lh ", "$ du -sh ", "$ df -h "):
        assert command in output
    assert re.search(r"-r--r--r-- .* [0-9a-f]{64}", output)
    assert_nothing_left(tmp_path)


@needs_fuse
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "--requests", "100000", "--seconds", "100", *SMALL[2:6])
    assert process.stdout is not None
    guard = threading.Timer(120, process.kill)
    guard.start()
    try:
        for line in process.stdout:
            if "hits" in line:
                break
        process.send_signal(number)
        process.stdout.read()
        assert process.wait() == 130
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    assert_nothing_left(tmp_path)


@needs_fuse
def test_what_is_kept_is_up(tmp_path: Path) -> None:
    process = start(tmp_path, *SMALL, "--keep")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    hint = re.search(r"kvfs down (\S+) && rm -r (\S+)", output)
    assert hint is not None
    try:
        listed = subprocess.run(
            [sys.executable, "-m", "kvfs", "ls", hint[1], "/kv/demo/conversations"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert re.search(r"[0-9a-f]{64}", listed.stdout)
    finally:
        down = [sys.executable, "-m", "kvfs", "down", hint[1]]
        subprocess.run(down, timeout=60, check=True)
        subprocess.run(["rm", "-r", hint[2]], check=True)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    "wrong", [["--block-size", "5000"], ["--trace", "/nonexistent"], ["--requests", "0"]]
)
def test_wrong_arguments_are_refused_before_anything_starts(
    tmp_path: Path, wrong: list[str]
) -> None:
    process = start(tmp_path, *wrong)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert_nothing_left(tmp_path)


def test_a_bad_trace_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("{}\n")
    process = start(tmp_path, "--trace", str(tmp_path / "bad"))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"{tmp_path}/bad:1:" in output


def test_trace_commands(tmp_path: Path) -> None:
    runner = CliRunner()
    path = str(tmp_path / "trace")
    done = runner.invoke(trace, ["generate", path, "--requests", "200", "--seed", "4"])
    assert done.exit_code == 0 and "200 requests" in done.output
    assert len(list(read_trace(path))) == 200
    shown = runner.invoke(trace, ["show", path])
    assert shown.exit_code == 0
    assert re.search(r"requests +200 +12,031", shown.output)
    assert runner.invoke(trace, ["show", "--requests", "150"]).exit_code == 0


def test_help_names_every_option() -> None:
    text = CliRunner().invoke(demo, ["--help"]).output
    documented = Path(__file__).parents[2].joinpath("docs/demo.md").read_text()
    for option in re.findall(r"(--[a-z-]+)", text):
        assert option == "--help" or option in documented
