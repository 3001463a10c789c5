"""Random POSIX operations give the same answers on the metadata service as on a kernel's directory.

KVFS_MODEL_EXAMPLES sets the number of histories of up to 100 operations (200 by default: 20,000),
always the same ones; with KVFS_MODEL_RANDOM they are new ones each time.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api_cluster import MetadataThread
from kvfs_base.cluster import Heartbeat, TargetReport
from kvfs_base.os_env import os_env
from kvfs_base.rpc import Request
from kvfs_base.types import Address, Attr
from kvfs_metadata.client import BlockingMetadataClient
from kvfs_metadata.config import MetadataConfig
from posix_model import PosixModel, check
from posix_trees import ServiceTree

EXAMPLES = int(os.environ.get("KVFS_MODEL_EXAMPLES", "200"))


def model_of(call: Any) -> type[PosixModel]:
    counter = itertools.count()

    class ServiceModel(PosixModel):
        def tree(self) -> ServiceTree:
            return ServiceTree(call, b"model-%d" % next(counter))

    return ServiceModel


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Address]:
    """The metadata service on LMDB behind a Unix socket, in a thread of its own."""
    address = Address.unix(str(tmp_path / "metadata.sock"))
    thread = MetadataThread(MetadataConfig(directory=str(tmp_path / "metadata"), unix=address))
    yield address
    thread.stop()


class Caller:
    """A client that also plays a chunk server, so that files can be made."""

    HEARTBEAT_EVERY = 100

    def __init__(self, address: Address) -> None:
        self._client = BlockingMetadataClient(os_env(), address)
        self._calls = 0

    def __call__(self, request: Request) -> Any:
        if self._calls % self.HEARTBEAT_EVERY == 0:
            report = TargetReport("disk", 1 << 40, 1 << 40, True, 0)
            self._client.call(Heartbeat("server", "host", None, None, (report,)))
        self._calls += 1
        return self._client.call(request)

    def close(self) -> None:
        self._client.close()


@pytest.mark.timeout(900)
def test_the_service_agrees_with_the_kernel(service: Address) -> None:
    call = Caller(service)
    try:
        check(model_of(call), EXAMPLES)
    finally:
        call.close()


def test_the_model_finds_a_wrong_answer(service: Address) -> None:
    """Planted: files lose their execute bits. The model must see it."""
    call = Caller(service)

    def forgetful(request: Request) -> Any:
        answer = call(request)
        if isinstance(answer, Attr) and answer.is_file:
            answer.mode &= ~0o111
        return answer

    try:
        with pytest.raises(AssertionError):
            check(model_of(forgetful), 20)
    finally:
        call.close()
