"""A cluster of several hosts on one machine: each is a network namespace on a bridge, with real
`kvfs` processes in it. Links between them are cut, lossy or slow on demand, and disks fill up and
fail.

    with Hosts(4) as hosts:
        hosts[1].start("metadata")
        hosts[2].start("chunks")
        hosts[4].start("agent")
        hosts.cut(1, 2)
        hosts.heal()

Hosts are numbered from 1 and have the addresses 10.77.0.1, 10.77.0.2 and so on. Their directories
are on the file system of the machine, so Unix sockets of any host can be dialled by the test; the
services do not do that, because the hosts' ids differ. TCP takes the cluster's secret.

What was made is gone after the block: processes, namespaces, mounts, directories. If the test's own
process is killed, the kernel ends the namespaces and the services.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from kvfs.mount import system
from kvfs.supervisor.child import PARENT_VARIABLE
from kvfs_base.errors import KvfsError
from kvfs_base.os_env import os_env
from kvfs_base.rpc import BlockingRpcClient, Request
from kvfs_base.types import Address
from kvfs_metadata.cluster.admin_messages import ClusterDetails, DescribeCluster, TargetDetails
from t5_cluster.processes import DEADLINE_SECONDS, KVFS, wait_until
from t5_cluster.slow_link import SlowLink

NETWORK = "10.77.0"
METADATA_PORT = 7000
CHUNKS_PORT = 7001
ARENA_BYTES = 64 << 20
CLONE_NEWNET = 0x40000000
TOOLS = ("ip", "nft", "nsenter", "unshare", "setpriv", "mount")
PREFIX = "kvfs-hosts-"


def missing() -> str:
    """Why there can be no hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [tool for tool in TOOLS if shutil.which(tool) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (scripts/system-packages.sh)"
    probe = ["unshare", "--net", "nft", "add table inet kvfs"]
    done = subprocess.run(probe, capture_output=True, check=False)
    if done.returncode != 0:
        return f"no network namespaces or nftables here: {done.stderr.decode().strip()}"
    return ""


def _command(*words: object, script: str | None = None) -> None:
    done = subprocess.run(
        [str(word) for word in words],
        input=None if script is None else script.encode(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}: {done.stderr.decode()}"


class _Namespace:
    """A network namespace that lives as long as the process that holds it, which also changes its
    rules. A child of our own would close what we have open as it starts: a file of a mount that
    hangs, because of the rules, maybe."""

    def __init__(self) -> None:
        holder = 'echo; while read -r file; do nft -f "$file" 2>&1; echo "$?"; done'
        self._holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", holder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"\n"
        self.pid = self._holder.pid
        self.path = f"/proc/{self.pid}/ns/net"

    def enter(self) -> list[str]:
        """What comes before a command that is to run in here. It keeps its process id."""
        return ["nsenter", f"--net={self.path}"]

    def rules(self, script: Path) -> None:
        """Carries out a script of nft."""
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.write(f"{script}\n".encode())
        self._holder.stdin.flush()
        answer = self._holder.stdout.readline()
        assert answer == b"0\n", answer.decode()

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.stdout.close()


class Service:
    """One `kvfs` process on a host. ``ready`` is the line that it printed."""

    def __init__(self, name: str, arguments: list[str], log: Path, more: dict[str, str]) -> None:
        self.name = name
        self.log = log
        self._arguments = arguments
        self._environment = os.environ | {PARENT_VARIABLE: str(os.getpid())} | more
        self.ready: dict[str, Any] = {}
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.end()
            raise AssertionError(f"{self.name} did not start:\n{self.log.read_text()[-2000:]}")
        self.ready = json.loads(line)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def addresses(self) -> list[str]:
        found: list[str] = self.ready["addresses"]
        return found

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL. Returns when it is gone."""
        self._process.kill()
        self._reap()

    def stop(self) -> None:
        """SIGTERM. Fails unless it ends well."""
        self._process.terminate()
        assert self._reap() == 0, f"{self.name} ended badly:\n{self.log.read_text()[-2000:]}"

    def _reap(self) -> int:
        code = self._process.wait(DEADLINE_SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def restart(self) -> None:
        """After ``kill`` or ``stop``: the same command. Returns once it serves."""
        assert not self.running
        self._start()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Whatever state it is in."""
        if self.running:
            self._process.kill()
        self._reap()


def _flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


class Host:
    """One of ``Hosts``."""

    def __init__(self, hosts: Hosts, number: int, directory: Path) -> None:
        self.number = number
        self.address = f"{NETWORK}.{number}"
        self.directory = directory
        self.services: list[Service] = []
        self._hosts = hosts
        self._namespace = _Namespace()
        self._mounts: list[Path] = []

    def connect(self, hub: _Namespace) -> None:
        """Plugs it into the bridge."""
        cable = f"host{self.number}"
        _command(
            *hub.enter(),
            *("ip", "-batch", "-"),
            script=f"link add {cable} type veth peer name eth0 netns {self._namespace.pid}\n"
            f"link set {cable} master bridge up\n",
        )
        _command(
            *self._namespace.enter(),
            *("ip", "-batch", "-"),
            script=f"address add {self.address}/24 dev eth0\nlink set eth0 up\nlink set lo up\n",
        )

    # --- processes

    def run(self, *words: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """A command on this host, to its end."""
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "check": False} | options
        arguments = [*self._namespace.enter(), *map(str, words)]
        return subprocess.run(arguments, timeout=DEADLINE_SECONDS, **options)

    def kvfs(self, *words: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """`kvfs WORDS` on this host, to its end. It knows the secret."""
        environment = os.environ | {"KVFS_SECRET_FILE": str(self._hosts.secret_file)}
        return self.run(*KVFS, *words, **({"env": environment} | options))

    def start(
        self, role: str, *, name: str = "", failing: Path | None = None, **settings: object
    ) -> Service:
        """`kvfs serve ROLE` (or `kvfs mount`, whose mount point is ``directory``/mnt) with
        ``settings`` over defaults that fit a host. Returns once it serves. ``failing`` is the
        directory of a disk for ``fail_disk``."""
        name = name or role
        filled = {
            key: value
            for key, value in (self._defaults(role, name) | settings).items()
            if value is not None
        }
        words = ["serve", role]
        if role == "mount":
            mountpoint = Path(str(filled.pop("mountpoint")))
            mountpoint.mkdir(exist_ok=True)
            self._mounts.append(mountpoint)
            words = ["mount", str(filled.pop("metadata")), str(mountpoint)]
        flags = [_flag(key.replace("_", "-"), value) for key, value in filled.items()]
        environment = {} if failing is None else self._failing(failing)
        arguments = [*self._namespace.enter(), *KVFS, *words, *flags]
        service = Service(name, arguments, self.directory / f"{name}.log", environment)
        self.services.append(service)
        return service

    def _defaults(self, role: str, name: str) -> dict[str, object]:
        found: dict[str, object] = {"secret_file": str(self._hosts.secret_file)}
        if role != "metadata":
            found["metadata"] = self._hosts.metadata
        if role != "mount":
            found["unix"] = f"unix:{self.directory}/{name}.sock"
        match role:
            case "metadata":
                found["directory"] = str(self.directory / name)
                found["tcp"] = f"tcp:{self.address}:{METADATA_PORT}"
            case "chunks":
                found["server_id"] = f"host{self.number}"
                found["directories"] = str(self.disk(name))
                found["tcp"] = f"tcp:{self.address}:{CHUNKS_PORT}"
            case "agent":
                found["arena_bytes"] = ARENA_BYTES
            case "mount":
                found["mountpoint"] = str(self.directory / "mnt")
        return found

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread is on this host: its sockets are, and threads that it starts."""
        with open("/proc/thread-self/ns/net", "rb") as home:
            with open(self._namespace.path, "rb") as namespace:
                _enter(namespace.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    # --- disks

    def small_disk(self, name: str, size_bytes: int) -> Path:
        """A new file system that holds no more than this."""
        path = self.directory / name
        path.mkdir()
        _command("mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "kvfs-test", path)
        self._mounts.append(path)
        return path

    def disk(self, name: str = "chunks") -> Path:
        """The directory of the target that ``start("chunks", name=...)`` has by default."""
        return self.directory / f"{name}-disk"

    def _failing(self, directory: Path) -> dict[str, str]:
        return {
            "LD_PRELOAD": str(self._hosts.failing_disk()),
            "KVFS_FAILING_DIRECTORY": str(directory),
            "KVFS_FAILING_WHILE": str(self.directory / "failing"),
        }

    def fail_disk(self) -> None:
        """From now on the ``failing`` directory of its services is a dead disk: EIO."""
        (self.directory / "failing").touch()

    def mend_disk(self) -> None:
        (self.directory / "failing").unlink()

    # --- links

    def apply(self, drops: list[str], redirects: list[str]) -> None:
        """Replaces the host's nftables rules, in one step. The chains stay: without them
        connections that were redirected would not find back."""
        lines = [
            "add table ip kvfs",
            "add chain ip kvfs drops { type filter hook input priority 0; }",
            "add chain ip kvfs redirects { type nat hook prerouting priority -100; }",
            "flush table ip kvfs",
            *(f"add rule ip kvfs drops {rule}" for rule in drops),
            *(f"add rule ip kvfs redirects {rule}" for rule in redirects),
        ]
        script = self.directory / "rules.nft"
        script.write_text("".join(f"{line}\n" for line in lines))
        self._namespace.rules(script)

    def close(self) -> None:
        for service in self.services:
            service.end()
        for path in self._mounts:
            if system.mounted_at(str(path)) is not None:
                system.unmount(str(path), lazy=True)
        self._namespace.close()


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


class Hosts:
    """``count`` hosts that reach each other, with a secret. ``missing`` says whether this machine
    can have them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._stack = contextlib.ExitStack()
        self._hosts: dict[int, Host] = {}
        self._drops: dict[tuple[int, int], int] = {}
        self._shut: set[tuple[int, int, int]] = set()
        self._slow: dict[tuple[int, int], SlowLink] = {}

    def __enter__(self) -> Hosts:
        with contextlib.ExitStack() as stack:
            # Short names: Unix sockets have 107 bytes.
            self.directory = Path(tempfile.mkdtemp(prefix=PREFIX))
            stack.callback(shutil.rmtree, self.directory)
            self.secret_file = self.directory / "secret"
            _command(*KVFS, "secret", self.secret_file)
            hub = _Namespace()
            stack.callback(hub.close)
            _command(*hub.enter(), *("ip", "link", "add", "bridge", "up", "type", "bridge"))
            for number in range(1, self._count + 1):
                directory = self.directory / str(number)
                directory.mkdir(mode=0o700)
                host = self._hosts[number] = Host(self, number, directory)
                stack.callback(host.close)
                host.connect(hub)
            stack.callback(self._close_links)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            print(self.logs(), file=sys.stderr)
        self._stack.close()

    def __getitem__(self, number: int) -> Host:
        return self._hosts[number]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts.values())

    @property
    def metadata(self) -> str:
        """TCP addresses of the metadata services that were started."""
        found = [
            address
            for host in self
            for service in host.services
            if service.ready["role"] == "metadata"
            for address in service.addresses
            if address.startswith("tcp:")
        ]
        assert found, "start a metadata service first"
        return ",".join(found)

    def logs(self) -> str:
        """The end of every log."""
        parts = []
        for host in self:
            for service in host.services:
                text = service.log.read_text(errors="replace")[-4000:]
                parts.append(f"--- {service.name} on host {host.number}\n{text}")
        return "\n".join(parts)

    # --- links

    def cut(self, one: int, other: int, *, one_way: bool = False) -> None:
        """No packet passes; with ``one_way`` those from ``other`` to ``one`` still do."""
        self.lose(one, other, 100, one_way=one_way)

    def isolate(self, number: int) -> None:
        """Cuts a host from all others."""
        for host in self:
            if host.number != number:
                self.cut(number, host.number)

    def lose(self, one: int, other: int, percent: int, *, one_way: bool = False) -> None:
        """So many of a hundred packets are lost, at random."""
        for pair in ((one, other),) if one_way else ((one, other), (other, one)):
            self._drops[pair] = percent
        self._apply()

    def shut(self, one: int, other: int, port: int) -> None:
        """Nothing that ``one`` sends to this TCP port of ``other`` arrives."""
        self._shut.add((one, other, port))
        self._apply()

    def delay(self, one: int, other: int, seconds: float, jitter: float = 0.0) -> SlowLink:
        """TCP connections that ``one`` opens to ``other`` from now on pass a proxy, which keeps
        each piece of bytes back for ``seconds`` and up to ``jitter`` more, both ways."""
        return self.slow(one, other, SlowLink.jittering, seconds, jitter, 10 * one + other)

    def slow(self, one: int, other: int, make: Any, *arguments: object) -> SlowLink:
        """As ``delay``, through the SlowLink that ``make(*arguments)`` makes."""
        with self[other].inside():
            link: SlowLink = make(*arguments)
        previous = self._slow.pop((one, other), None)
        self._slow[one, other] = link
        self._apply()
        if previous is not None:
            previous.close()
        return link

    def heal(self) -> None:
        """All links are as they were at first. Connections that went through a proxy break."""
        self._drops.clear()
        self._shut.clear()
        self._apply()
        self._close_links()  # while packets that say so still find their way
        self._slow.clear()
        self._apply()

    def _close_links(self) -> None:
        for link in self._slow.values():
            link.close()

    def _apply(self) -> None:
        for host in self:
            drops = [
                f"ip saddr {self[source].address} numgen random mod 100 < {percent} drop"
                if percent < 100
                else f"ip saddr {self[source].address} drop"
                for (source, target), percent in self._drops.items()
                if target == host.number and percent
            ]
            drops += [
                f"ip saddr {self[source].address} tcp dport {port} drop"
                for source, target, port in sorted(self._shut)
                if target == host.number
            ]
            redirects = [
                f"ip saddr {self[source].address} meta l4proto tcp redirect to :{link.port}"
                for (source, target), link in self._slow.items()
                if target == host.number
            ]
            host.apply(drops, redirects)

    # --- disks

    def failing_disk(self) -> Path:
        """The library that makes disks fail, compiled once."""
        path = self.directory / "failing_disk.so"
        if not path.exists():
            source = Path(__file__).with_name("failing_disk.c")
            _command("gcc", "-shared", "-fPIC", "-O1", "-Wall", "-o", path, source, "-ldl")
        return path

    # --- waiting

    def ask_metadata(self, request: Request) -> Any:
        """The answer, or None while the service is away."""
        client = BlockingRpcClient(os_env().blocking_network, Address.parse(self.metadata_unix))
        try:
            return client.call(request)
        except KvfsError:
            return None
        finally:
            client.close()

    @property
    def metadata_unix(self) -> str:
        """The Unix address of the first metadata service."""
        return next(
            address
            for host in self
            for service in host.services
            for address in service.addresses
            if service.ready["role"] == "metadata" and address.startswith("unix:")
        )

    def targets(self) -> dict[str, TargetDetails]:
        """What the metadata service says of the targets, by server; nothing while it is away."""
        details: ClusterDetails | None = self.ask_metadata(DescribeCluster())
        return {} if details is None else {one.server_id: one for one in details.targets}

    def wait_for_states(self, **states: str) -> None:
        """Until the targets have these states, by server: ``host2="offline"``."""

        def reached() -> bool:
            found = self.targets()
            return all(k in found and found[k].state.value == v for k, v in states.items())

        wait_until(reached, f"targets are {states}")
