"""Reads the syntax tree of every production module: time, chance, sockets and files come in through
the seams, and nothing unpickles or evaluates what it was given."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for room in ("kvfs", "metadata", "datapath", "gds", "tools")
    for path in sorted((ROOT / room).rglob("*.py"))
]

FORBIDDEN_IMPORTS = {"time", "random", "socket", "datetime", "select", "selectors", "asyncio"}
# Where the simulator runs the code, threads come through their seam as well.
SIMULATED = ("datapath/", "kvfs/kvfs_base/counters.py", "metadata/kvfs_metadata/client.py")
THREADS = {"threading", "concurrent", "queue"}
FORBIDDEN_EVERYWHERE = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "numpy.load", "np.load"}

# Where a seam is made real, and the programs around the services.
OUTER = {
    "kvfs/kvfs_base/os_env.py": "the real seams themselves: clock and chance",
    "kvfs/kvfs_base/os_network.py": "the same: sockets",
    "kvfs/kvfs_base/os_handshake.py": "the same: proofs on sockets, the secret's file",
    "kvfs/kvfs_base/seams.py": "names the type of chance",
    "kvfs/kvfs_base/testing.py": "memory seams, over socket pairs",
    "kvfs/kvfs/agent/link.py": "looks whether the agent has answered",
    "kvfs/kvfs/mount/adoptions.py": "looks whether a chunk server has answered",
    "kvfs/kvfs/mount/device.py": "waits for the kernel's requests",
    "kvfs/kvfs/mount/fusermount.py": "is passed a descriptor by a program",
    "metadata/kvfs_metadata/engines/lmdb_engine.py": "the engine's own files and boot id",
    "metadata/kvfs_metadata/engines/postgres_link.py": "waits for libpq's sockets",
}
OUTER_FOLDERS = ("tools/", "kvfs/kvfs/cli", "kvfs/kvfs/supervisor", "kvfs/kvfs/integrations/")


def is_outer(name: str) -> bool:
    return name in OUTER or name.startswith(OUTER_FOLDERS)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.partition(".")[0]


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def problems(path: Path, name: str) -> list[str]:
    tree = ast.parse(path.read_text())
    found = [f"{name}:{line} imports {m}" for line, m in imports(tree) if m in FORBIDDEN_EVERYWHERE]
    found += [f"{name}:{line} calls {c}" for line, c in calls(tree) if c in FORBIDDEN_CALLS]
    if not is_outer(name):
        found += [f"{name}:{n} imports {m}" for n, m in imports(tree) if m in FORBIDDEN_IMPORTS]
        found += [f"{name}:{n} calls {c}" for n, c in calls(tree) if c in ("open", "os.urandom")]
    if name.startswith(SIMULATED):
        found += [f"{name}:{n} imports {m}" for n, m in imports(tree) if m in THREADS]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_goes_through_the_seams(path: Path) -> None:
    assert problems(path, str(path.relative_to(ROOT))) == []


def test_the_lint_finds_what_it_looks_for(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import time\nimport pickle\nfrom random import choice\nx = eval('1')\nopen('f')"
    )
    assert len(problems(bad, "metadata/kvfs_metadata/bad.py")) == 5
    assert len(problems(bad, "tools/kvfs_tools/bad.py")) == 2
    bad.write_text("import threading\nfrom concurrent.futures import Future")
    assert len(problems(bad, "datapath/kvfs_datapath/bad.py")) == 2


def test_exceptions_name_files_that_exist() -> None:
    assert [name for name in OUTER if not (ROOT / name).exists()] == []


def test_no_bound_is_defined_twice() -> None:
    """The second one would count for those who want the first."""
    files = [path for path in SOURCES if path.name == "limits.py"]
    assert len(files) == 5
    names = [
        target.id
        for path in files
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    ]
    assert len(names) > 100
    assert sorted(names) == sorted(set(names))
