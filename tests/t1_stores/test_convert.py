"""Blocks that are stored as fp8 for pages of bf16."""

from __future__ import annotations

import numpy as np
import pytest

from kvfs_base.errors import InvalidRequest
from kvfs_gds.convert import Fp8
from kvfs_gds.device import CpuDevice
from kvfs_gds.load import Pages
from kvfs_gds.loader import Loader
from kvfs_gds.paged import PagedLayout
from loader_fakes import MemoryNamespace

LAYERS, PAGES, VALUES = 2, 8, 64


def bf16(values: list[float]) -> np.ndarray:
    return (np.array(values, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)


def test_known_values_and_ties() -> None:
    """One, the largest, what is larger, the smallest, half of it (a tie, to zero), three halves of
    it (a tie, to two), between 16 and 18 (a tie, to 16), between 18 and 20 (a tie, to 20)."""
    values = [1.0, 448.0, 1e6, 2.0**-9, 2.0**-10, 3 * 2.0**-10, 17.0, 19.0, -1.0, -0.0]
    found = Fp8((1.0,)).encode(bf16(values).view(np.uint8), 0)
    assert found.tolist() == [0x38, 0x7E, 0x7E, 1, 0, 2, 0x58, 0x5A, 0xB8, 0x80]
    special = np.array([0x7FC0, 0xFFC0, 0x7F80], dtype=np.uint16)  # NaNs, infinity
    assert Fp8((1.0,)).encode(special.view(np.uint8), 0).tolist() == [0x7F, 0x7F, 0x7E]


def test_every_stored_value_comes_back_as_itself() -> None:
    codes = np.arange(256, dtype=np.uint8)
    for scale in (1.0, 0.125):
        convert = Fp8((1.0, scale))
        there = convert.decode(codes, 1)
        again = convert.encode(there, 1)
        nan = (codes & 0x7F) == 0x7F
        assert (again[~nan] == codes[~nan]).all() and (again[nan] == 0x7F).all()


def test_it_is_the_fp8_of_torch() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(1).uniform(-448, 448, 20_000).astype(np.float32)
    values[::2] *= 1e-3
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    tensor = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    stored = tensor.to(torch.float8_e4m3fn)
    convert = Fp8((1.0,))
    found = convert.encode(bits.view(np.uint8), 0)
    assert (found == stored.view(torch.uint8).numpy()).all()
    back = stored.to(torch.bfloat16).view(torch.int16).numpy()
    assert (convert.decode(found, 0).view(np.int16) == back).all()


def test_a_store_halves_the_bytes_and_a_load_brings_the_values_back() -> None:
    rng = np.random.default_rng(2)
    values = rng.uniform(-3, 3, (LAYERS, 2, PAGES, VALUES)).astype(np.float32)
    cache = list((values.view(np.uint32) >> 16).astype(np.uint16))
    layout = PagedLayout.vllm(cache)
    convert = Fp8((0.5, 0.25, 1.0, 2.0))
    target = [np.zeros_like(tensor) for tensor in cache]
    namespace = MemoryNamespace(1 << 20)
    keys = [number.to_bytes(32, "little") for number in range(PAGES)]
    table = np.arange(PAGES, dtype=np.int32).reshape(-1, 1)
    with Loader.open(namespace, CpuDevice(), ring_bytes=1 << 20) as loader:
        pages = Pages(layout, table, convert)
        assert loader.store(keys, pages).result() == PAGES
        assert {len(data) for data in namespace.stored.values()} == {LAYERS * 2 * VALUES}
        order = table[::-1].copy()
        there = Pages(PagedLayout.vllm(target), order, convert)
        assert loader.load(keys, there).result() == [True] * PAGES
        with pytest.raises(InvalidRequest, match="one scale a fragment"):
            loader.load(keys, Pages(layout, table, Fp8((1.0,)))).result()
    for layer in range(LAYERS):
        for kv in range(2):
            fragment = 2 * layer + kv
            stored = convert.encode(cache[layer][kv].view(np.uint8), fragment)
            wanted = convert.decode(stored, fragment).view(np.uint16)
            assert (target[layer][kv][::-1] == wanted.reshape(PAGES, VALUES)).all()
            found = (wanted.astype(np.uint32) << 16).view(np.float32)
            assert np.abs(found - values[layer, kv].ravel().reshape(found.shape)).max() < 0.15
    namespace.close()


def test_scales_are_positive() -> None:
    for scale in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InvalidRequest):
            Fp8((scale,))
