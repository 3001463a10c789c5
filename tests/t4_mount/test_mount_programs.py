"""Programs that people run on a file system."""

from __future__ import annotations

import filecmp
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.both_frontends


def run(*argv: str | Path, cwd: Path | None = None) -> str:
    """The output of a program; what it prints is shown when it fails."""
    environment = {
        **os.environ,
        "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@example.org",
        "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@example.org",
        "GIT_CONFIG_GLOBAL": "/dev/null",
    }  # fmt: skip
    done = subprocess.run(
        [str(a) for a in argv], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{argv}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with files of many sizes, links, modes and times."""
    rng = random.Random(1)
    root = tmp_path / "tree"
    for n in range(60):
        path = root / f"directory-{n % 7}" / f"file-{n}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.choice([0, 1, 100, 4096, 50_000, 300_000])))
        path.chmod(rng.choice([0o600, 0o644, 0o755]))
        os.utime(path, ns=(rng.randrange(10**18), rng.randrange(10**18)))
    (root / "link").symlink_to("directory-0/file-0")
    os.link(root / "directory-1/file-1", root / "directory-2/hard")
    return root


def assert_same(left: Path, right: Path) -> None:
    compared = filecmp.dircmp(left, right, ignore=[], hide=[])

    def walk(found: filecmp.dircmp[str]) -> None:
        assert not (found.left_only or found.right_only or found.funny_files)
        _, differ, errors = filecmp.cmpfiles(
            found.left, found.right, found.common_files, shallow=False
        )
        assert not (differ or errors)
        for below in found.subdirs.values():
            walk(below)

    walk(compared)


def test_cp(work: Path, tree: Path) -> None:
    run("cp", "-r", tree, work / "copy")
    assert_same(tree, work / "copy")
    run("cp", "-a", work / "copy", work / "again")
    assert_same(tree, work / "again")
    assert (work / "again/link").is_symlink()
    assert (work / "again/directory-2/hard").stat().st_nlink == 1  # cp -r broke the link


def test_rsync(work: Path, tree: Path) -> None:
    need("rsync")
    run("rsync", "-aH", f"{tree}/", work / "copy")
    assert_same(tree, work / "copy")
    for path in tree.rglob("*"):
        mine, theirs = path.lstat(), (work / "copy" / path.relative_to(tree)).lstat()
        assert mine.st_mode == theirs.st_mode
        if path.is_file() and not path.is_symlink():
            assert mine.st_mtime_ns == theirs.st_mtime_ns
            assert mine.st_nlink == theirs.st_nlink
    assert run("rsync", "-aHin", "--checksum", f"{tree}/", work / "copy") == ""


def test_tar(work: Path, tree: Path) -> None:
    run("tar", "cf", work / "tree.tar", "-C", tree, ".")
    (work / "out").mkdir()
    run("tar", "xf", work / "tree.tar", "-C", work / "out")
    assert_same(tree, work / "out")
    run("rm", "-r", work / "out")
    assert not (work / "out").exists()


def test_git(work: Path, tree: Path) -> None:
    need("git")
    run("git", "init", "-q", "-b", "main", cwd=tree)
    run("git", "add", ".", cwd=tree)
    run("git", "commit", "-q", "-m", "first", cwd=tree)
    clone = work / "clone"
    run("git", "clone", "-q", tree, clone)
    assert run("git", "status", "--porcelain", cwd=clone) == ""
    (clone / "directory-0/new").write_text("new\n")
    run("git", "add", ".", cwd=clone)
    run("git", "commit", "-q", "-m", "second", cwd=clone)
    run("git", "gc", "-q", cwd=clone)
    run("git", "fsck", "--strict", cwd=clone)
    assert run("git", "rev-list", "--count", "HEAD", cwd=clone).strip() == "2"
    assert run("git", "status", "--porcelain", cwd=clone) == ""


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_sqlite(work: Path, journal: str) -> None:
    path = work / "data.db"
    with sqlite3.connect(path) as database:
        assert database.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
        database.execute("create table t (id integer primary key, value blob)")
    database.close()
    first, second = sqlite3.connect(path), sqlite3.connect(path)
    for n in range(60):
        writer, reader = (first, second) if n % 2 else (second, first)
        with writer:
            writer.execute("insert into t (value) values (?)", (bytes([n]) * 3000,))
        assert reader.execute("select count(*) from t").fetchone() == (n + 1,)
    with first:
        first.execute("delete from t where id % 3 = 0")
    first.execute("vacuum")
    assert second.execute("pragma integrity_check").fetchone() == ("ok",)
    assert second.execute("select count(*) from t").fetchone() == (40,)
    first.close()
    second.close()
    program = (
        "import sqlite3, sys\n"
        "print(*sqlite3.connect(sys.argv[1]).execute('select count(*) from t').fetchone())\n"
    )
    assert run("python3", "-c", program, path).strip() == "40"


def test_compiling_a_program(work: Path) -> None:
    need("gcc")
    need("make")
    (work / "hello.h").write_text("const char *greeting(void);\n")
    (work / "greeting.c").write_text(
        '#include "hello.h"\nconst char *greeting(void) { return "hello from kvfs"; }\n'
    )
    (work / "main.c").write_text(
        '#include <stdio.h>\n#include "hello.h"\nint main(void) { return puts(greeting()) < 0; }\n'
    )
    (work / "Makefile").write_text(
        "hello: main.o greeting.o\n\tgcc -o $@ $^\n%.o: %.c hello.h\n\tgcc -c -o $@ $<\n"
        "libgreeting.a: greeting.o\n\tar rcs $@ $^\n"
    )
    run("make", "-j2", "hello", "libgreeting.a", cwd=work)
    assert run(work / "hello").strip() == "hello from kvfs"
    assert "up to date" in run("make", "hello", cwd=work)


def test_pip_into_an_environment(work: Path, tmp_path: Path) -> None:
    """A wheel with many small modules and a script; the environment lies on the mount."""
    pytest.importorskip("pip")
    wheel = tmp_path / "many-1.0-py3-none-any.whl"
    files = {f"many/module_{n}.py": f"VALUE = {n}\n" for n in range(40)}
    files["many/__init__.py"] = "def main():\n    print('hello from', __file__)\n"
    info = {
        "METADATA": "Metadata-Version: 2.1\nName: many\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": "[console_scripts]\nmany = many:main\n",
    }
    files |= {f"many-1.0.dist-info/{name}": text for name, text in info.items()}
    names = [*files, "many-1.0.dist-info/RECORD"]
    files["many-1.0.dist-info/RECORD"] = "".join(f"{name},,\n" for name in names)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    environment = work / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", wheel)
    assert run(environment / "bin/many").strip().endswith("/many/__init__.py")
    assert run(python, "-c", "import many.module_7 as m; print(m.VALUE)").strip() == "7"
    run(sys.executable, "-m", "pip", "--python", python, "uninstall", "-q", "-y", "many")
    assert not list(environment.rglob("module_*"))


@pytest.mark.parametrize(
    "how",
    [
        "--ioengine=psync --rw=randwrite --bs=4k",
        "--ioengine=psync --rw=randrw --bsrange=1k-300k --fsync=16",
        "--ioengine=mmap --rw=randwrite --bs=8k",
        "--ioengine=libaio --iodepth=8 --direct=1 --rw=write --bs=256k",
    ],
)
def test_fio_reads_what_it_wrote(work: Path, how: str) -> None:
    need("fio")
    sizes = ["--size=8m", "--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64"]
    sizes += ["--verify_state_save=0"]
    run("fio", "--name=job", f"--directory={work}", *sizes, *how.split(), "--output-format=terse")
