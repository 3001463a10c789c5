"""Paged copies on a CUDA device agree with the CPU's, byte for byte, and touch nothing else."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvfs_base.errors import InvalidRequest
from kvfs_gds.convert import Fp8
from kvfs_gds.paged import HostMemory, PagedLayout, Transfer, copy_on_cpu

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.gpu
try:
    if not cupy.cuda.runtime.getDeviceCount():
        pytest.skip("no CUDA device", allow_module_level=True)
except cupy.cuda.runtime.CUDARuntimeError:
    pytest.skip("no CUDA driver", allow_module_level=True)

from kvfs_gds import cuda as cuda_module  # noqa: E402
from kvfs_gds import staging as staging_module  # noqa: E402
from kvfs_gds.cuda import CudaDevice, Way  # noqa: E402
from kvfs_gds.device import open_device  # noqa: E402
from kvfs_gds.registration import REGISTER_SLICE_BYTES, Registration  # noqa: E402

POISON = 0xA5
KINDS = ["vllm", "flashinfer", "mla", "sglang", "page_first", "heads_first"]
LAYERS, PAGES = 3, 64


@pytest.fixture(scope="module")
def copier() -> CudaDevice:
    return CudaDevice()


@pytest.fixture
def arena() -> Iterator[tuple[np.ndarray[Any, Any], HostMemory]]:
    """A memfd as its owner writes it, and the read-only mapping that a reader registers."""
    size = REGISTER_SLICE_BYTES + (64 << 20)  # two slices: copies cross the seam
    fd = os.memfd_create("arena")
    os.ftruncate(fd, size)
    writable = np.frombuffer(mmap.mmap(fd, size), dtype=np.uint8)
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    mapping = mmap.mmap(reader, size, mmap.MAP_SHARED, mmap.PROT_READ)
    yield writable, HostMemory.of(mapping)
    os.close(reader)
    os.close(fd)


def tensors(kind: str, piece: int, on: Any) -> tuple[PagedLayout, list[Any]]:
    """A poisoned paged cache of numpy or cupy arrays and its layout."""

    def full(*shape: int) -> Any:
        found = on.full(shape, POISON, dtype=on.uint8)
        if on is cupy:  # our streams do not wait for the one that fills it
            cupy.cuda.get_current_stream().synchronize()
        return found

    if kind == "vllm":
        ts = [full(2, PAGES, piece) for _ in range(LAYERS)]
        return PagedLayout.vllm(ts), ts
    if kind == "flashinfer":
        ts = [full(PAGES, 2, piece) for _ in range(LAYERS)]
        return PagedLayout.flashinfer(ts), ts
    if kind == "mla":
        ts = [full(PAGES, piece) for _ in range(LAYERS)]
        return PagedLayout.mla(ts), ts
    if kind == "page_first":
        ts = [full(PAGES, LAYERS, piece) for _ in "kv"]
        return PagedLayout.sglang_page_first(*ts), ts
    if kind == "heads_first":
        ts = [full(1, 2, PAGES * 2, piece // 2) for _ in range(2 * LAYERS)]
        return PagedLayout.heads_first([*zip(ts[::2], ts[1::2], strict=True)], 2), ts
    ts = [full(PAGES * 2, piece // 2) for _ in range(2 * LAYERS)]
    return PagedLayout.sglang(ts[::2], ts[1::2], 2), ts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [32, 1152, 4096, 36864, 65536])
@pytest.mark.parametrize("per_block", [1, 4])
def test_load_and_store_agree_with_the_cpu(
    copier: CudaDevice, arena: Any, kind: str, piece: int, per_block: int
) -> None:
    writable, reader = arena
    rng = np.random.default_rng(piece + per_block)
    cpu_layout, cpu = tensors(kind, piece, np)
    gpu_layout, gpu = tensors(kind, piece, cupy)
    size = cpu_layout.block_bytes(per_block)
    blocks = min(PAGES // per_block, 12)
    slots = rng.permutation(len(writable) // size)[:blocks]
    slots[0] = REGISTER_SLICE_BYTES // size  # across or next to the seam
    slots = np.unique(slots)
    offsets = slots.astype(np.int64) * size
    for offset in offsets:
        writable[offset : offset + size] = rng.integers(0, 256, size, dtype=np.uint8)
    pages = rng.permutation(PAGES)[: len(slots) * per_block].astype(np.int32)
    pages = pages.reshape(len(slots), per_block)
    registration = Registration(reader)
    stream = copier.stream(urgent=True)
    for first, end in ((1, 2), (0, LAYERS)):
        on_gpu = Transfer(reader, offsets, gpu_layout, pages)
        registration.ensure(on_gpu)
        plan = copier.plan(on_gpu)
        copier.copy(plan, first, end, stream)
        copy_on_cpu(Transfer(reader, offsets, cpu_layout, pages), first, end, store=False)
        stream.synchronize()
        for a, b in zip(cpu, gpu, strict=True):
            assert (a == b.get()).all()
    registration.close()

    staging = np.full(size * len(slots), POISON, dtype=np.uint8)
    registration = Registration(HostMemory.of(staging))
    registration.register_all()
    assert registration.registered_bytes == staging.nbytes
    tight = np.arange(len(slots), dtype=np.int64) * size
    back = Transfer(HostMemory.of(staging), tight, gpu_layout, pages)
    plan = copier.plan(back, store=True)
    copier.copy(plan, 0, LAYERS, stream, store=True)
    stream.synchronize()
    for at, offset in zip(tight, offsets, strict=True):
        assert (staging[at : at + size] == writable[offset : offset + size]).all()
    registration.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot_bytes", [1 << 17, 5 << 16, 1 << 20])
@pytest.mark.parametrize("per_block", [1, 3])
def test_pieces_come_through_few_small_slots(
    arena: Any, monkeypatch: pytest.MonkeyPatch, kind: str, slot_bytes: int, per_block: int
) -> None:
    """All layers, and some, of many blocks, again and again while earlier ones are under way: each
    slot is used dozens of times. Blocks lie across the seam of two registrations, too."""
    monkeypatch.setattr(cuda_module, "STAGING_SLOT_BYTES", slot_bytes)
    monkeypatch.setattr(staging_module, "STAGING_SLOT_BYTES", slot_bytes)
    monkeypatch.setattr(cuda_module, "LAYER_BYTES_MIN", 0)
    device = CudaDevice()
    writable, reader = arena
    rng = np.random.default_rng(slot_bytes + per_block)
    piece = 8208
    cpu_layout, cpu = tensors(kind, piece, np)
    gpu_layout, gpu = tensors(kind, piece, cupy)
    size = cpu_layout.block_bytes(per_block)
    blocks = PAGES // per_block
    registration = Registration(reader)
    low, high = REGISTER_SLICE_BYTES - 8 * size, REGISTER_SLICE_BYTES + blocks * size
    writable[low:high] = rng.integers(0, 256, high - low, dtype=np.uint8)
    streams = [device.stream(urgent=True), device.stream(urgent=False)]
    last, plans = device.record(streams[0]), []
    for turn in range(12):
        first, end = [(0, 1), (1, 3), (0, 3), (2, 3)][turn % 4]
        start = REGISTER_SLICE_BYTES - (turn + 1) * (size // 32) * 16
        offsets = start + size * rng.permutation(blocks).astype(np.int64)
        pages = rng.permutation(PAGES)[: blocks * per_block].astype(np.int32)
        transfer = Transfer(reader, offsets, gpu_layout, pages.reshape(blocks, per_block))
        registration.ensure(transfer)
        plans.append(device.plan(transfer, store=False))
        assert plans[-1].way is Way.STAGED
        stream = streams[turn % 3 == 2]
        device.wait_for(stream, last)
        device.copy(plans[-1], first, end, stream)
        last = device.record(stream)
        on_cpu = Transfer(reader, offsets, cpu_layout, transfer.pages)
        copy_on_cpu(on_cpu, first, end, store=False)
    cupy.cuda.Device().synchronize()
    for a, b in zip(cpu, gpu, strict=True):
        assert (a == b.get()).all()
    assert device.staging_bytes == 3 * slot_bytes
    registration.close()


def test_the_way_is_chosen_by_size(copier: CudaDevice, arena: Any) -> None:
    _, reader = arena
    offsets = np.arange(4, dtype=np.int64) * (8 << 20)
    pages = np.array([[3], [1], [2], [0]], dtype=np.int32)

    def way(piece: int, *, store: bool = False) -> Way:
        layers = [cupy.empty((2, 4, piece), dtype=cupy.uint8) for _ in range(2)]
        transfer = Transfer(reader, offsets, PagedLayout.vllm(layers), pages)
        return copier.plan(transfer, store=store).way

    assert way(8192) is Way.KERNEL
    assert way(65536) is way(131072) is Way.STAGED
    assert way(262144) is Way.ENGINE
    assert way(65536, store=True) is Way.KERNEL
    assert way(131072, store=True) is Way.ENGINE
    with pytest.raises(InvalidRequest, match="for loads"):
        layers = [cupy.empty((2, 4, 65536), dtype=cupy.uint8) for _ in range(2)]
        plan = copier.plan(Transfer(reader, offsets, PagedLayout.vllm(layers), pages))
        copier.copy(plan, 0, 1, copier.stream(urgent=True), store=True)


def test_without_memory_to_stage_in_the_kernel_copies(
    arena: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise cupy.cuda.memory.OutOfMemoryError(1, 1, 0)

    caplog.set_level("INFO", "kvfs_gds.cuda")
    monkeypatch.setattr(cuda_module, "Staging", refuse)
    device = CudaDevice()
    layers = [cupy.empty((2, 4, 65536), dtype=cupy.uint8)]
    table = np.array([[0]], dtype=np.int32)
    transfer = Transfer(arena[1], np.array([0], dtype=np.int64), PagedLayout.vllm(layers), table)
    assert device.plan(transfer, store=False).way is Way.KERNEL
    assert "no memory to stage" in caplog.text
    assert device.staging_bytes == 0


@pytest.mark.parametrize("store", [False, True])
def test_long_runs_go_through_the_copy_engine(copier: CudaDevice, arena: Any, store: bool) -> None:
    """Rows of 8 MiB, some of them neighbours, and one across the seam of two registrations."""
    writable, reader = arena
    row, rows = 8 << 20, 10
    rng = np.random.default_rng(5)
    tensor = cupy.asarray(rng.integers(0, 256, (rows, row), dtype=np.uint8))
    host = np.full(REGISTER_SLICE_BYTES + (64 << 20), POISON, dtype=np.uint8)
    memory = HostMemory.of(host) if store else reader
    offsets = np.array([0, row, REGISTER_SLICE_BYTES - 4096, 3 * row], dtype=np.int64)
    pages = np.array([[2], [3], [9], [0]], dtype=np.int32)
    writable[: 4 * row] = rng.integers(0, 256, 4 * row, dtype=np.uint8)
    writable[offsets[2] : offsets[2] + row] = rng.integers(0, 256, row, dtype=np.uint8)
    before = tensor.get()
    transfer = Transfer(memory, offsets, PagedLayout.rows(tensor), pages)
    registration = copier.register(memory)
    registration.ensure(transfer)
    stream = copier.stream(urgent=False)
    copier.copy(copier.plan(transfer, store=store), 0, 1, stream, store=store)
    copier.record(stream).wait()
    registration.close()
    after = tensor.get()
    for offset, page in zip(offsets, pages[:, 0], strict=True):
        wanted = before[page] if store else writable[offset : offset + row]
        assert ((host[offset : offset + row] if store else after[page]) == wanted).all()
    if store:
        assert (host[4 * row : 16 * row] == POISON).all()
    else:
        untouched = sorted(set(range(rows)) - set(pages[:, 0].tolist()))
        assert (after[untouched] == before[untouched]).all()


@pytest.mark.parametrize("per_block", [1, 3])
def test_conversions_are_those_of_the_cpu(copier: CudaDevice, per_block: int) -> None:
    """All kinds of bf16, NaN and infinities too, to fp8 in host memory and back."""
    if int(cupy.cuda.Device().compute_capability) < 89:
        pytest.skip("this GPU does not know fp8")
    rng = np.random.default_rng(3)
    blocks, values = 12 // per_block, 8 * 77
    shape = (2, 12, values)
    tensors = [rng.integers(0, 1 << 16, shape, dtype=np.uint16) for _ in range(LAYERS)]
    for tensor in tensors:  # half of them of a size that fp8 can hold
        small = rng.uniform(-500, 500, (2, 6, values)).astype(np.float32)
        tensor[:, :6] = small.view(np.uint32) >> 16
    on_gpu = [cupy.asarray(tensor) for tensor in tensors]
    convert = Fp8((1.0, 0.5, 3.0, 0.01, 1.7, 2.0))
    pages = rng.permutation(12).astype(np.int32).reshape(blocks, per_block)
    size = LAYERS * 2 * per_block * values
    offsets = np.arange(blocks, dtype=np.int64) * size
    hosts = [np.full(size * blocks, POISON, dtype=np.uint8) for _ in range(2)]
    cpu, gpu = (
        Transfer(HostMemory.of(host), offsets, PagedLayout.vllm(ts), pages, convert)
        for host, ts in zip(hosts, (tensors, on_gpu), strict=True)
    )
    registration = Registration(gpu.host)
    registration.register_all()
    stream, plan = copier.stream(urgent=True), copier.plan(gpu)
    for store in (True, False):
        for tensor, there in zip(tensors, on_gpu, strict=True):
            if not store:
                tensor.fill(POISON)
                there.fill(POISON)
        cupy.cuda.Device().synchronize()
        copier.copy(plan, 0, LAYERS, stream, store=store)
        copy_on_cpu(cpu, 0, LAYERS, store=store)
        stream.synchronize()
        assert (hosts[0] == hosts[1]).all()
        for tensor, there in zip(tensors, on_gpu, strict=True):
            assert (tensor == there.get()).all()
    registration.close()


def test_one_registration_serves_everybody(copier: CudaDevice, arena: Any) -> None:
    _, reader = arena
    first, second = copier.register(reader), copier.register(reader)
    layout = PagedLayout.mla([cupy.zeros((4, 4096), dtype=cupy.uint8)])
    offsets, pages = np.array([0], dtype=np.int64), np.array([[0]], dtype=np.int32)
    first.ensure(Transfer(reader, offsets, layout, pages))
    assert second.registered_bytes == REGISTER_SLICE_BYTES
    first.close()
    first.close()
    assert second.registered_bytes == REGISTER_SLICE_BYTES
    second.close()


def test_memory_that_cannot_be_registered_is_a_typed_error() -> None:
    with pytest.raises(InvalidRequest):
        Registration(HostMemory(address=4096, nbytes=4096)).register_all()


def test_streams_of_callers_are_taken(copier: CudaDevice) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    assert copier.wrap(stream).ptr == stream.ptr
    assert copier.wrap(stream.ptr).ptr == stream.ptr
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        mine = torch.cuda.Stream()
        assert copier.wrap(mine).ptr == mine.cuda_stream
    with pytest.raises(InvalidRequest):
        copier.wrap("stream")
    assert open_device("auto").name == "cuda:0"
