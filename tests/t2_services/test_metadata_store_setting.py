"""The setting ``store``: where a metadata service keeps its state."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from kvfs_base.errors import InvalidRequest
from kvfs_base.os_env import os_env
from kvfs_base.types import Address
from kvfs_metadata import messages as m
from kvfs_metadata import records
from kvfs_metadata.client import MetadataClient
from kvfs_metadata.config import MetadataConfig
from kvfs_metadata.engines import stores
from kvfs_metadata.service import serve_metadata
from t2_services.metadata_rig import DIRECTORY, ROOT


def config(directory: Path, store: str) -> MetadataConfig:
    address = Address.unix(str(directory / "meta.sock"))
    return MetadataConfig(str(directory / "unused"), address, store=store)


@pytest.mark.parametrize("kind", ["postgres", "directory"])
def test_a_service_keeps_its_state_in_the_store(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    url = request.getfixturevalue("postgres_url") if kind == "postgres" else None
    settings = config(tmp_path, url or str(tmp_path / "elsewhere"))
    env = os_env()

    async def serve_and(name: bytes) -> list[bytes]:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                await nursery.start(
                    lambda task_status: serve_metadata(env, settings, task_status=task_status)
                )
                async with MetadataClient(env, settings.unix) as client:
                    await client.call(m.Make(ROOT, name, DIRECTORY))
                    found = await client.call(m.ReadDir(ROOT))
                nursery.cancel_scope.cancel()
        return [entry for entry, _ in found.entries]

    assert trio.run(serve_and, b"first") == [b"first", b"kv"]
    assert trio.run(serve_and, b"second") == [b"first", b"kv", b"second"]
    assert not (tmp_path / "unused").exists()
    found = stores.read_store(env, settings.store, lambda read: read.get(records.FORMAT_KEY))
    assert found == records.FORMAT


def test_another_kind_of_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises((InvalidRequest, ExceptionGroup)) as caught:
        trio.run(serve_metadata, os_env(), config(tmp_path, "mysql://there/db"))
    assert "mysql" in str(caught.value)
