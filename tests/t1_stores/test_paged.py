"""Paged layouts: the addresses of each engine's tensors, and copies there and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs_base.errors import InvalidRequest
from kvfs_gds.paged import HostMemory, PagedLayout, Transfer, copy_on_cpu, token_table

LAYERS, PAGES, TOKENS, HEADS, DIM = 3, 10, 4, 2, 8


def caches(kind: str) -> tuple[PagedLayout, Any]:
    """A layout and a function [layer, fragment, page] -> bytes of that piece, by plain indexing."""
    rng = np.random.default_rng(1)

    def tensor(*shape: int) -> Any:
        return rng.integers(0, 2**16, shape, dtype=np.uint16)

    if kind == "vllm":
        ts = [tensor(2, PAGES, TOKENS, HEADS, DIM) for _ in range(LAYERS)]
        return PagedLayout.vllm(ts), lambda layer, f, p: ts[layer][f, p].tobytes()
    if kind == "flashinfer":
        ts = [tensor(PAGES, 2, TOKENS, HEADS, DIM) for _ in range(LAYERS)]
        return PagedLayout.flashinfer(ts), lambda layer, f, p: ts[layer][p, f].tobytes()
    if kind == "mla":
        ts = [tensor(PAGES, TOKENS, 24) for _ in range(LAYERS)]
        return PagedLayout.mla(ts), lambda layer, f, p: ts[layer][p].tobytes()
    if kind == "page_first_direct":
        ts = [tensor(PAGES, LAYERS, TOKENS, HEADS, DIM) for _ in "kv"]
        layout = PagedLayout.sglang_page_first(*ts)
        return layout, lambda layer, f, p: ts[f][p, layer].tobytes()
    if kind == "page_first":  # a token is a page
        ts = [tensor(PAGES, LAYERS, HEADS, DIM) for _ in "kv"]
        layout = PagedLayout.sglang_page_first(*ts)
        return layout, lambda layer, f, p: ts[f][p, layer].tobytes()
    if kind == "rows":
        ts = [tensor(PAGES, 5, 8)]
        return PagedLayout.rows(ts[0]), lambda layer, f, p: ts[0][p].tobytes()
    if kind == "heads_first":
        pairs = [tuple(tensor(1, HEADS, PAGES * TOKENS, DIM) for _ in "kv") for _ in range(LAYERS)]
        return PagedLayout.heads_first(pairs, TOKENS), lambda layer, f, p: pairs[layer][f // HEADS][
            0, f % HEADS, p * TOKENS : (p + 1) * TOKENS
        ].tobytes()
    if kind == "latent":  # as transformers caches MLA: 24 latent and 8 rotary values a token
        pairs = [
            (tensor(1, 1, PAGES * TOKENS, 24), tensor(1, 1, PAGES * TOKENS, 8))
            for _ in range(LAYERS)
        ]
        return PagedLayout.heads_first(pairs, TOKENS), lambda layer, f, p: (
            pairs[layer][0][0, 0, p * TOKENS : (p + 1) * TOKENS].ravel()[f * 32 : f * 32 + 32]
            if f < 3
            else pairs[layer][1][0, 0, p * TOKENS : (p + 1) * TOKENS]
        ).tobytes()
    k = [tensor(PAGES * TOKENS, HEADS, DIM) for _ in range(LAYERS)]
    v = [tensor(PAGES * TOKENS, HEADS, DIM) for _ in range(LAYERS)]
    return (
        PagedLayout.sglang(k, v, TOKENS),
        lambda layer, f, p: (k, v)[f][layer][p * TOKENS : (p + 1) * TOKENS].tobytes(),
    )


KINDS = ["vllm", "flashinfer", "mla", "sglang", "page_first_direct", "page_first", "rows"]
KINDS += ["heads_first", "latent"]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_blocks_go_to_their_pages_and_back(kind: str, data: st.DataObject) -> None:
    layout, piece_at = caches(kind)
    per_block = data.draw(st.sampled_from([1, 2]))
    blocks = data.draw(st.integers(0, PAGES // per_block))
    chosen = data.draw(st.permutations(range(PAGES)))[: blocks * per_block]
    pages = np.array(chosen, dtype=np.int32).reshape(blocks, per_block)
    before = {
        (layer, f, p): piece_at(layer, f, p)
        for layer in range(layout.layers)
        for f in range(layout.fragments_per_layer)
        for p in range(PAGES)
    }
    size = layout.block_bytes(per_block)
    slots = data.draw(st.permutations(range(PAGES)))[:blocks]
    host = np.random.default_rng(2).integers(0, 256, PAGES * size, dtype=np.uint8)
    stored = host.copy()
    offsets = np.array(slots, dtype=np.int64) * size
    transfer = Transfer(HostMemory.of(host), offsets, layout, pages)
    first = data.draw(st.integers(0, layout.layers))
    end = data.draw(st.integers(first, layout.layers))

    copy_on_cpu(transfer, first, end, store=False)
    expected = dict(before)
    for b, slot in enumerate(slots):
        pieces = stored[slot * size : (slot + 1) * size].reshape(
            layout.layers, layout.fragments_per_layer, per_block, layout.piece_bytes
        )
        for layer in range(first, end):
            for f in range(layout.fragments_per_layer):
                for i, page in enumerate(pages[b].tolist()):
                    expected[layer, f, page] = pieces[layer, f, i].tobytes()
    assert {at: piece_at(*at) for at in before} == expected

    host[:] = 0
    copy_on_cpu(transfer, first, end, store=True)
    keep = np.zeros_like(stored)
    layer_bytes = size // layout.layers
    for slot in slots:
        part = slice(slot * size + first * layer_bytes, slot * size + end * layer_bytes)
        keep[part] = stored[part]
    assert (host == keep).all()


@pytest.mark.parametrize("kind", KINDS)
def test_runs_cover_every_piece_once(kind: str) -> None:
    """What a copy engine is given copies what the pieces would."""
    layout, _ = caches(kind)
    host = HostMemory.of(np.zeros(PAGES * layout.block_bytes(2), dtype=np.uint8))
    pages = np.array([[0, 1], [2, 3], [7, 5]], dtype=np.int32)
    offsets = np.array([0, 1, 4], dtype=np.int64) * layout.block_bytes(2)
    transfer = Transfer(host, offsets, layout, pages)
    near, far = transfer.addresses(0, layout.layers)
    pieces = {
        (a + i, b + i)
        for a, b in zip(near.tolist(), far.tolist(), strict=True)
        for i in range(0, layout.piece_bytes, 16)
    }
    runs = list(zip(*(part.tolist() for part in transfer.runs(0, layout.layers)), strict=True))
    assert {(a + i, b + i) for a, b, size in runs for i in range(0, size, 16)} == pieces
    assert sum(size for _, _, size in runs) == transfer.nbytes
    if kind == "rows":
        assert len(runs) == 3  # the first four pages are one run, then two pages apart
    expected = np.frombuffer(host.owner, dtype=np.uint8)
    assert int(near.min()) == expected.ctypes.data


@pytest.mark.parametrize("kind", KINDS)
def test_no_run_is_longer_than_the_layout_allows(kind: str) -> None:
    layout, _ = caches(kind)
    host = HostMemory.of(np.zeros(PAGES * layout.block_bytes(2), dtype=np.uint8))
    pages = np.arange(6, dtype=np.int32).reshape(3, 2)
    offsets = np.arange(3, dtype=np.int64) * layout.block_bytes(2)
    transfer = Transfer(host, offsets, layout, pages)
    longest = int(transfer.runs(0, 1)[2].max())
    assert longest <= transfer.run_bytes_max() <= transfer.nbytes
    if kind in {"rows", "mla"}:
        assert longest == transfer.run_bytes_max()


@pytest.mark.parametrize("seam", [48, 100, 1 << 20])
def test_runs_are_cut_at_seams(seam: int) -> None:
    """Two neighbours of 64 bytes, and one that lies apart."""
    pages = np.array([[0], [1], [3]], dtype=np.int32)
    layout = PagedLayout.rows(np.zeros((4, 64), dtype=np.uint8))
    host = HostMemory.of(np.zeros(512, dtype=np.uint8))
    transfer = Transfer(host, np.array([16, 80, 304], dtype=np.int64), layout, pages)
    assert transfer.run_bytes() == 96
    whole = transfer.runs(0, 1)
    assert whole[2].tolist() == [128, 64]
    cut = transfer.runs(0, 1, seam_bytes=seam)
    start = cut[0] - host.address
    assert (start // seam == (start + cut[2] - 1) // seam).all()
    bytes_of = [
        [
            (a + i, b + i)
            for a, b, n in zip(*(r.tolist() for r in runs), strict=True)
            for i in range(n)
        ]
        for runs in (whole, cut)
    ]
    assert bytes_of[0] == bytes_of[1]


def test_tokens_of_pages_are_counted_out() -> None:
    table = token_table(np.array([[2, 0], [5, 1]], dtype=np.int32), 3)
    assert table.tolist() == [[6, 7, 8, 0, 1, 2], [15, 16, 17, 3, 4, 5]]


def test_tensors_come_through_dlpack() -> None:
    class Exported:
        def __init__(self, array: Any) -> None:
            self.array = array

        def __dlpack__(self, **settings: Any) -> Any:
            return self.array.__dlpack__(**settings)

        def __dlpack_device__(self) -> Any:
            return self.array.__dlpack_device__()

    array = np.zeros((PAGES, TOKENS, 24), dtype=np.uint16)
    assert PagedLayout.mla([Exported(array)]) == PagedLayout.mla([array])


def test_torch_dtypes_have_their_sizes() -> None:
    torch = pytest.importorskip("torch")
    for dtype, size in ((torch.bfloat16, 2), (torch.float16, 2), (torch.float8_e4m3fn, 1)):
        cache = torch.zeros((2, PAGES, TOKENS, HEADS, DIM), dtype=dtype)
        layout = PagedLayout.vllm([cache])
        assert layout.piece_bytes == TOKENS * HEADS * DIM * size
        assert layout.bases[1] - layout.bases[0] == PAGES * layout.piece_bytes


def good(**changes: Any) -> Transfer:
    layout, _ = caches("vllm")
    host = HostMemory.of(np.zeros(4 * layout.block_bytes(1), dtype=np.uint8))
    fields: dict[str, Any] = {
        "host": host,
        "offsets": np.array([0], dtype=np.int64),
        "layout": layout,
        "pages": np.array([[0]], dtype=np.int32),
    }
    return Transfer(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"pages": np.array([[PAGES]], dtype=np.int32)},
        {"pages": np.array([[-1]], dtype=np.int32)},
        {"pages": np.array([[0], [1]], dtype=np.int32)},
        {"pages": np.array([0], dtype=np.int32)},
        {"offsets": np.array([-16], dtype=np.int64)},
        {"offsets": np.array([10**9], dtype=np.int64)},
        {"offsets": np.array([8], dtype=np.int64)},
    ],
    ids=str,
)
def test_transfers_outside_their_memory_are_refused(changes: dict[str, Any]) -> None:
    good()
    with pytest.raises(InvalidRequest):
        good(**changes)


def test_layouts_that_do_not_fit_the_kernel_are_refused() -> None:
    with pytest.raises(InvalidRequest):  # K and V are not where they should be
        PagedLayout.vllm([np.zeros((3, PAGES, TOKENS, HEADS, DIM), dtype=np.uint16)])
    with pytest.raises(InvalidRequest):  # a page is not contiguous
        PagedLayout.vllm([np.zeros((2, PAGES, TOKENS, HEADS, DIM), dtype=np.uint16)[..., ::2]])
    with pytest.raises(InvalidRequest):  # 6-byte pages
        PagedLayout.mla([np.zeros((PAGES, 1, 3), dtype=np.uint16)])
    with pytest.raises(InvalidRequest):  # layers of different shapes
        PagedLayout.mla([np.zeros((PAGES, n, 8), dtype=np.uint16) for n in (1, 2)])
    with pytest.raises(InvalidRequest):
        PagedLayout.mla([object()])
