"""Paged KV caches: where the pieces of a stored block lie on a device, and copies on the CPU.

A stored block is a row of *fragments*, end to end: layer by layer, K then V (MLA has one fragment a
layer, caches with the heads outermost one a head). A fragment covers the block's tokens: it is one
or several *pieces*, one for each page of the engine. Engines differ only in where a piece goes:

    address(fragment, page) = bases[fragment] + page * strides[fragment]
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvfs_base.errors import InvalidRequest
from kvfs_gds.convert import Fp8

VECTOR_BYTES = 16
"""The GPU copies 16-byte vectors: pieces and addresses are multiples of it."""

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """A range of memory with blocks in it: an arena mapping, a staging area, a pinned buffer."""

    address: int
    nbytes: int
    read_only: bool = False
    owner: Any = None
    """Kept alive as long as this object is."""
    on_device: bool = False
    """It is the device's own memory, which needs no registration."""

    @classmethod
    def of(cls, buffer: Any) -> HostMemory:
        """The memory of any contiguous buffer, writable or not."""
        array = np.frombuffer(buffer, dtype=np.uint8)
        return cls(array.ctypes.data, array.nbytes, not array.flags.writeable, buffer)


def _strided(tensor: Any) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    """(address, shape, strides in bytes, item size) of a torch, cupy or numpy array, or of anything
    that speaks DLPack, on any device."""
    if hasattr(tensor, "data_ptr"):
        item = int(tensor.element_size())
        strides = tuple(int(s) * item for s in tensor.stride())
        return int(tensor.data_ptr()), tuple(tensor.shape), strides, item
    interface = getattr(tensor, "__cuda_array_interface__", None) or getattr(
        tensor, "__array_interface__", None
    )
    if interface is not None:
        return (
            int(interface["data"][0]),
            tuple(tensor.shape),
            tuple(tensor.strides),
            tensor.itemsize,
        )
    if not hasattr(tensor, "__dlpack__"):
        raise InvalidRequest(detail=f"not a tensor: {type(tensor).__name__}")
    return _strided(_from_dlpack(tensor))


_DLPACK_CPU = 1


def _from_dlpack(tensor: Any) -> Any:
    if int(tensor.__dlpack_device__()[0]) == _DLPACK_CPU:
        return np.from_dlpack(tensor)
    import cupy

    return cupy.from_dlpack(tensor)


def _inner_bytes(shape: Sequence[int], strides: Sequence[int], item: int) -> int:
    """Bytes of a contiguous row-major tail of dimensions. Raises InvalidRequest if it is not."""
    expected = item
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            raise InvalidRequest(detail=f"a page is not contiguous: {shape} strides {strides}")
        expected *= size
    return expected


@dataclasses.dataclass(frozen=True)
class PagedLayout:
    """Addresses of a paged KV cache. ``bases`` and ``strides`` have one entry a fragment, layer by
    layer with ``fragments_per_layer`` each; ``num_pages`` bounds the page numbers. Whoever holds a
    layout keeps the tensors alive: it knows addresses only."""

    bases: tuple[int, ...]
    strides: tuple[int, ...]
    piece_bytes: int
    num_pages: int
    fragments_per_layer: int = 2

    def __post_init__(self) -> None:
        numbers = (self.piece_bytes, *self.strides, *self.bases)
        if not self.bases or self.piece_bytes <= 0 or self.num_pages <= 0:
            raise InvalidRequest(detail="empty paged layout")
        if len(self.strides) != len(self.bases):
            raise InvalidRequest(detail="one stride a fragment")
        if any(n % VECTOR_BYTES for n in numbers):
            raise InvalidRequest(detail=f"addresses must be multiples of {VECTOR_BYTES}")
        if self.piece_bytes > min(self.strides) and self.num_pages > 1:
            raise InvalidRequest(detail="pages overlap")
        if len(self.bases) % self.fragments_per_layer:
            raise InvalidRequest(detail="fragments do not make whole layers")

    @property
    def layers(self) -> int:
        return len(self.bases) // self.fragments_per_layer

    def block_bytes(self, pages_per_block: int) -> int:
        return len(self.bases) * pages_per_block * self.piece_bytes

    @classmethod
    def vllm(cls, layers: Sequence[Any]) -> PagedLayout:
        """One tensor a layer, [2, pages, page_tokens, heads, dim] (FlashAttention backend)."""
        return cls._of([(t, 0, 1) for t in layers])

    @classmethod
    def flashinfer(cls, layers: Sequence[Any]) -> PagedLayout:
        """One tensor a layer, [pages, 2, ...] with NHD or HND pages."""
        return cls._of([(t, 1, 0) for t in layers])

    @classmethod
    def mla(cls, layers: Sequence[Any]) -> PagedLayout:
        """One tensor a layer, [pages, page_tokens, latent + rope]."""
        return cls._of([(t, None, 0) for t in layers])

    @classmethod
    def sglang(cls, k: Sequence[Any], v: Sequence[Any], page_tokens: int) -> PagedLayout:
        """SGLang's pools, layer_first: [tokens, heads, dim], one K and one V tensor a layer; page
        ``p`` is tokens ``p * page_tokens`` and on."""
        bases: list[int] = []
        shapes = set()
        for tensor in (t for pair in zip(k, v, strict=True) for t in pair):
            address, shape, strides, item = _strided(tensor)
            token_bytes = _inner_bytes(shape[1:], strides[1:], item)
            if strides[0] != token_bytes:
                raise InvalidRequest(detail="tokens of a pool are not contiguous")
            bases.append(address)
            shapes.add((page_tokens * token_bytes, shape[0] // page_tokens))
        piece, pages = _only(shapes)
        return cls(tuple(bases), (piece,) * len(bases), piece, pages, 2)

    @classmethod
    def sglang_page_first(cls, k: Any, v: Any) -> PagedLayout:
        """SGLang's pools with the layers inside: K and V of [pages, layers, page_tokens, heads,
        dim] (page_first_direct), or of [tokens, layers, heads, dim] (page_first), where a token is
        a page (``token_table``)."""
        bases: list[int] = []
        shapes = set()
        per_tensor = []
        for tensor in (k, v):
            address, shape, strides, item = _strided(tensor)
            piece = _inner_bytes(shape[2:], strides[2:], item)
            per_tensor.append((address, strides[1]))
            shapes.add((strides[0], piece, shape[0], shape[1]))
        stride, piece, pages, layers = _only(shapes)
        for layer in range(layers):
            bases += [address + layer * step for address, step in per_tensor]
        return cls(tuple(bases), (stride,) * len(bases), piece, pages, 2)

    @classmethod
    def heads_first(cls, layers: Sequence[tuple[Any, Any]], page_tokens: int) -> PagedLayout:
        """Two tensors a layer, [1, heads, tokens, dim], as in the caches of transformers; page
        ``p`` is tokens ``p * page_tokens`` and on. The two may differ in heads and dim (MLA: latent
        and rotary part): then a piece is the largest size that divides both."""
        found = [_strided(tensor) for pair in layers for tensor in pair]
        rows = []
        for _, shape, strides, item in found:
            row = _inner_bytes(shape[3:], strides[3:], item)
            if len(shape) != 4 or shape[0] != 1 or (shape[2] > 1 and strides[2] != row):
                raise InvalidRequest(detail=f"not [1, heads, tokens, dim]: {shape}, {strides}")
            rows.append(row * page_tokens)
        piece = math.gcd(*rows)
        bases: list[int] = []
        steps: list[int] = []
        for (address, shape, strides, _), row in zip(found, rows, strict=True):
            for head in range(shape[1]):
                bases += range(
                    address + head * strides[1], address + head * strides[1] + row, piece
                )
                steps += [row] * (row // piece)
        pages = _only({shape[2] // page_tokens for _, shape, _, _ in found})
        return cls(tuple(bases), tuple(steps), piece, pages, len(bases) // len(layers))

    @classmethod
    def rows(cls, tensor: Any) -> PagedLayout:
        """One contiguous tensor, [blocks, ...]: block ``i`` is its row ``i``, in the order in which
        it was stored. There are no layers to wait for: all of it is one."""
        address, shape, strides, item = _strided(tensor)
        row = _inner_bytes(shape[1:], strides[1:], item)
        return cls((address,), (strides[0],), row, shape[0], 1)

    @classmethod
    def _of(cls, tensors: Sequence[tuple[Any, int | None, int]]) -> PagedLayout:
        bases: list[int] = []
        shapes = set()
        for tensor, kv_axis, page_axis in tensors:
            address, shape, strides, item = _strided(tensor)
            outer = 1 if kv_axis is None else 2
            if kv_axis is not None and shape[kv_axis] != 2:
                raise InvalidRequest(detail=f"axis {kv_axis} of {shape} must be K and V")
            piece = _inner_bytes(shape[outer:], strides[outer:], item)
            bases.append(address)
            if kv_axis is not None:
                bases.append(address + strides[kv_axis])
            shapes.add((strides[page_axis], piece, shape[page_axis], outer))
        stride, piece, pages, per_layer = _only(shapes)
        return cls(tuple(bases), (stride,) * len(bases), piece, pages, per_layer)


def token_table(pages: Int32s, page_tokens: int) -> Int32s:
    """[blocks, pages] as [blocks, tokens]: for layouts where a token is a page."""
    tokens = pages[..., None] * page_tokens + np.arange(page_tokens, dtype=np.int32)
    return tokens.reshape(len(pages), -1).astype(np.int32)


def _only(shapes: set[Any]) -> Any:
    if len(shapes) != 1:
        raise InvalidRequest(detail=f"layers differ in shape: {sorted(shapes)}")
    return shapes.pop()


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Blocks of host memory and the pages they belong to. ``offsets`` [blocks] are bytes into the
    host memory; ``pages`` [blocks, pages_per_block] are page numbers. Checked once, here."""

    host: HostMemory
    offsets: Int64s
    layout: PagedLayout
    pages: Int32s
    convert: Fp8 | None = None

    def __post_init__(self) -> None:
        blocks = len(self.offsets)
        if self.convert is not None and len(self.convert.scales) != len(self.layout.bases):
            raise InvalidRequest(detail="one scale a fragment")
        if self.pages.ndim != 2 or len(self.pages) != blocks:
            raise InvalidRequest(detail=f"pages {self.pages.shape} for {blocks} blocks")
        if not blocks:
            return
        if self.pages.min() < 0 or self.pages.max() >= self.layout.num_pages:
            raise InvalidRequest(detail=f"page outside 0..{self.layout.num_pages - 1}")
        end = int(self.offsets.max()) + self.block_bytes
        if int(self.offsets.min()) < 0 or end > self.host.nbytes:
            raise InvalidRequest(detail=f"block ends at {end} of {self.host.nbytes} bytes")
        if (int(np.bitwise_or.reduce(self.offsets)) | self.host.address) % VECTOR_BYTES:
            raise InvalidRequest(detail=f"offsets must be multiples of {VECTOR_BYTES}")

    @property
    def pages_per_block(self) -> int:
        return int(self.pages.shape[1])

    @property
    def piece_bytes(self) -> int:
        """Of a piece as it is stored."""
        piece = self.layout.piece_bytes
        return piece if self.convert is None else self.convert.stored_bytes(piece)

    @property
    def block_bytes(self) -> int:
        return len(self.layout.bases) * self.pages_per_block * self.piece_bytes

    @property
    def layer_bytes(self) -> int:
        """What a block has of one layer; it lies in one piece."""
        return self.layout.fragments_per_layer * self.pages_per_block * self.piece_bytes

    @property
    def nbytes(self) -> int:
        return self.block_bytes * len(self.offsets)

    def addresses(self, first_layer: int, end_layer: int) -> tuple[Int64s, Int64s]:
        """(host, device) address of every piece of some layers, in the order of the host blocks:
        what a copy engine is given."""
        layout = self.layout
        fragments = np.arange(
            first_layer * layout.fragments_per_layer, end_layer * layout.fragments_per_layer
        )
        places = fragments[:, None] * self.pages_per_block + np.arange(self.pages_per_block)
        near = self.host.address + self.offsets[:, None, None] + places * self.piece_bytes
        bases = np.array(layout.bases, dtype=np.int64)[fragments]
        strides = np.array(layout.strides, dtype=np.int64)[fragments]
        far = bases[:, None] + self.pages[:, None, :].astype(np.int64) * strides[:, None]
        return near.ravel(), far.ravel()

    def runs(
        self, first_layer: int, end_layer: int, *, seam_bytes: int = 0
    ) -> tuple[Int64s, Int64s, Int64s]:
        """(host address, device address, bytes) of what is contiguous on both sides. With
        ``seam_bytes`` none of them lies across a multiple of it in the host memory."""
        near, far = self.addresses(first_layer, end_layer)
        piece = self.layout.piece_bytes
        breaks = np.flatnonzero((np.diff(near) != piece) | (np.diff(far) != piece)) + 1
        starts = np.concatenate([[0], breaks]).astype(np.int64)
        ends = np.concatenate([breaks, [len(near)]]).astype(np.int64)
        runs = near[starts], far[starts], (ends - starts) * piece
        return cut(*runs, self.host.address, seam_bytes) if seam_bytes else runs

    def run_bytes_max(self) -> int:
        """Runs of a layer are no longer than that, but by chance: told by the layout alone, in 1 us
        where to look at runs takes 200."""
        layout = self.layout
        if layout.layers == 1:
            return self.nbytes  # blocks may follow one another on both sides
        fragment_bytes = self.pages_per_block * layout.piece_bytes
        bases = layout.bases[: layout.fragments_per_layer]
        adjacent = all(b - a == fragment_bytes for a, b in itertools.pairwise(bases))
        return self.layer_bytes if adjacent else fragment_bytes

    def run_bytes(self) -> int:
        """About how long the runs of a layer are: the mean of the first blocks'."""
        some = slice(0, _SAMPLE_BLOCKS)
        sample = Transfer(self.host, self.offsets[some], self.layout, self.pages[some])
        return int(sample.runs(0, 1)[2].mean())


_SAMPLE_BLOCKS = 64


def cut(
    near: Int64s, far: Int64s, sizes: Int64s, base: int, step: int
) -> tuple[Int64s, Int64s, Int64s]:
    """Runs, cut where their host address passes a multiple of ``step`` behind ``base``."""
    start = near - base
    parts = (start + sizes - 1) // step - start // step + 1
    if parts.max() == 1:
        return near, far, sizes
    run = np.repeat(np.arange(len(near)), parts)
    number = np.arange(len(run)) - np.repeat(np.cumsum(parts) - parts, parts)
    slices = start[run] // step + number
    first = np.maximum(slices * step, start[run])
    end = np.minimum((slices + 1) * step, start[run] + sizes[run])
    skipped = first - start[run]
    return near[run] + skipped, far[run] + skipped, end - first


def copy_on_cpu(transfer: Transfer, first_layer: int, end_layer: int, *, store: bool) -> None:
    """The same copies as the GPU kernel's, by memmove: for engines on the CPU and for tests.
    ``store`` copies pages to host memory, otherwise host memory to pages."""
    layout = transfer.layout
    piece, page_piece = transfer.piece_bytes, layout.piece_bytes
    fragments = range(
        first_layer * layout.fragments_per_layer, end_layer * layout.fragments_per_layer
    )
    fragment_bytes = piece * transfer.pages_per_block
    for offset, pages in zip(transfer.offsets.tolist(), transfer.pages.tolist(), strict=True):
        block = transfer.host.address + offset
        for fragment in fragments:
            near = block + fragment * fragment_bytes
            for page in pages:
                far = layout.bases[fragment] + page * layout.strides[fragment]
                if transfer.convert is None:
                    ctypes.memmove(near if store else far, far if store else near, piece)
                elif store:
                    _memory(near, piece)[:] = transfer.convert.encode(
                        _memory(far, page_piece), fragment
                    )
                else:
                    _memory(far, page_piece)[:] = transfer.convert.decode(
                        _memory(near, piece), fragment
                    )
                near += piece


def _memory(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
