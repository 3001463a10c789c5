"""The agent's watch: blocks that the metadata service leases it, and their uses that it never saw.

What is leased is kept by ``BlockCache``; docs/design/0011-block-leases.md has the rules. One thread
asks for what is revoked, on a connection of its own, and between two answers tells the service what
the agent has answered for by itself.
"""

from __future__ import annotations

import logging

from kvfs.agent.backends import MetadataCalls
from kvfs_base import threads
from kvfs_base.errors import InodeStale, KvfsError, NotSupported
from kvfs_base.limits import (
    BATCH_BLOCKS_MAX,
    BLOCK_KEY_BYTES,
    USED_KEYS_BYTES_MAX,
    USES_TOLD_SECONDS,
    WATCH_AGAIN_SECONDS,
)
from kvfs_base.rpc import BlockingRpcClient
from kvfs_base.seams import Env
from kvfs_base.types import Address
from kvfs_gds.block_cache import BlockCache
from kvfs_metadata.limits import WATCH_MARGIN_SECONDS, WATCH_SECONDS
from kvfs_metadata.messages import Revoked, UseBlocks, Watch

log = logging.getLogger(__name__)

WATCHER_BYTES = 16
KEYS_BYTES_MAX = BATCH_BLOCKS_MAX * BLOCK_KEY_BYTES


class Uses:
    """Uses of blocks that the metadata service has not heard of. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threads.lock()
        self._pending: dict[tuple[int, bytes], UseBlocks] = {}
        """By namespace and keys, the last used at the end."""
        self._bytes = 0

    def matched(self, namespace: int, keys: bytes) -> None:
        self._add(namespace, keys, 1, 0)

    def looked_up(self, namespace: int, keys: bytes) -> None:
        self._add(namespace, keys, 0, 1)

    def _add(self, namespace: int, keys: bytes, matches: int, look_ups: int) -> None:
        count = len(keys) // BLOCK_KEY_BYTES
        name = (namespace, keys)
        with self._lock:
            known = self._pending.pop(name, None)
            if known is None:
                self._bytes += len(keys)
                known = UseBlocks(namespace, keys)
            self._pending[name] = UseBlocks(
                namespace, keys, known.matched + matches * count, known.looked_up + look_ups * count
            )
            while self._bytes > USED_KEYS_BYTES_MAX:
                self._bytes -= len(self._pending.pop(next(iter(self._pending))).keys)

    def take(self) -> list[UseBlocks]:
        """All of them, the first used first, in few requests."""
        if not self._pending:
            return []
        with self._lock:
            pending, self._pending = self._pending, {}
            self._bytes = 0
        joined: list[UseBlocks] = []
        for use in pending.values():
            last = joined[-1] if joined else None
            if (
                last is None
                or last.namespace != use.namespace
                or len(last.keys) + len(use.keys) > KEYS_BYTES_MAX
            ):
                joined.append(use)
                continue
            joined[-1] = UseBlocks(
                use.namespace,
                last.keys + use.keys,
                last.matched + use.matched,
                last.looked_up + use.looked_up,
            )
        return joined

    def tell(self, metadata: MetadataCalls) -> None:
        """Raises what the service raised, but for namespaces that are no more."""
        for use in self.take():
            try:
                metadata.call(use)
            except InodeStale:
                pass


class Watching:
    """Keeps ``cache`` told of what is revoked, from ``start`` to ``stop``."""

    def __init__(
        self,
        env: Env,
        addresses: tuple[Address, ...],
        watcher: bytes,
        cache: BlockCache,
        uses: Uses,
    ) -> None:
        """``watcher`` is the session that blocks are leased to."""
        self._watcher = watcher
        self._clock = env.clock
        self._cache = cache
        self._uses = uses
        self._stopped = threads.event()
        # Who closes a connection must have dropped everything: the service goes on without him.
        self._rpc = BlockingRpcClient(env.blocking_network, addresses, before_close=self._drop_all)
        self._thread = threads.thread(self._run, name="kvfs-agent-watch")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._rpc.shutdown()
        self._thread.join()
        self._rpc.close()

    def _drop_all(self) -> None:
        self._cache.revoke_all(watching=False)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._watch()
            except NotSupported as exc:
                log.info("every block is looked up: %s", exc)
                return
            except KvfsError as exc:
                log.debug("the watch ended: %s", exc)
            finally:
                self._rpc.close()
            self._stopped.wait(WATCH_AGAIN_SECONDS)

    def _watch(self) -> None:
        seen = 0
        told_at = self._clock.monotonic()
        while not self._stopped.is_set():
            asked_at = self._clock.monotonic()
            revoked: Revoked = self._rpc.call(
                Watch(self._watcher, seen), WATCH_SECONDS - WATCH_MARGIN_SECONDS
            )
            if revoked.everything or not seen:
                self._cache.revoke_all(watching=True)
            self._cache.revoke(revoked.inodes)
            self._cache.watch(asked_at + WATCH_SECONDS - WATCH_MARGIN_SECONDS)
            seen = revoked.number
            # Somebody may wait for the next Watch to say that what was revoked is dropped.
            if not revoked.inodes or asked_at - told_at > USES_TOLD_SECONDS:
                told_at = asked_at
                self._uses.tell(self._rpc)


__all__ = ["WATCHER_BYTES", "Uses", "Watching"]
