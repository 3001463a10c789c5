"""KV of Hugging Face transformers models, kept in kvfs.

    model = AutoModelForCausalLM.from_pretrained(name)
    prefixes = PrefixCache.open(client, model, name=name, revision=commit)

    cache = prefixes.new_cache()
    model(document, cache=cache)                     # prefill, once
    prefixes.store(document[0], cache)

    cache, known = prefixes.load(prompt[0])          # any process, any time later
    model.generate(prompt, cache=cache)              # computes prompt[known:] only

A block holds K and V of ``block_tokens`` tokens of *all* layers, also of those with a sliding
window. Such a layer needs no more than its window to go on, but which tokens these are depends on
where the next prompt leaves the stored text; with every token of every layer kept, every prefix can
be restored. docs/transformers.md has the rule and the layout byte for byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvfs.keys import block_keys
from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import (
    BATCH_BLOCKS_MAX,
    BLOCK_BYTES_MAX,
    MIB,
)
from kvfs_base.types import KVLayout

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

    from kvfs.client import Client

BLOCK_ORDER = "layer,kv,head,token,dim"
"""Axes of a block, outermost first; ``kv`` is 0 for K, 1 for V."""

BATCH_BYTES = 64 * MIB
"""Blocks that are put or leased at a time: a quarter GiB of arena serves four callers."""

VOLATILE_CONFIG = frozenset(
    {"_name_or_path", "name_or_path", "transformers_version", "use_cache", "quantization_config"}
)
"""Fields of a configuration that say where a model came from, not what it computes. The weights
are named by the revision."""


class BlockNamespace(Protocol):
    """What is needed of ``kvfs.Namespace``."""

    @property
    def layout(self) -> KVLayout: ...

    def match(self, keys: Sequence[bytes]) -> int: ...

    def put(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> int: ...

    def get(self, keys: Sequence[bytes]) -> AbstractContextManager[Sequence[memoryview | None]]: ...


@dataclasses.dataclass(frozen=True)
class _LayerWindow:
    """One cached layer: ``window`` tokens are visible to a query, itself included; 0 is all."""

    window: int

    def first_needed(self, tokens: int) -> int:
        """The first of ``tokens`` that a query behind them can see."""
        return max(0, tokens - self.window + 1) if self.window else 0


class PrefixCache:
    """Stores and restores prefixes of one model. Thread-safe as its namespace is."""

    def __init__(
        self, namespace: BlockNamespace, config: PretrainedConfig, *, salt: bytes = b""
    ) -> None:
        """``namespace`` must have the layout that ``model_layout`` gives for ``config``. ``salt``
        keeps users of one model apart. Raises InvalidRequest for models whose layers keep anything
        else than K and V of equal shapes (linear attention, per-layer head counts)."""
        self.namespace = namespace
        self.layout = namespace.layout
        self.config = config
        self.salt = salt
        self._windows = _layer_windows(config)
        if self.layout.order != BLOCK_ORDER or self.layout.layers != len(self._windows):
            raise InvalidRequest(detail=f"the namespace holds {self.layout}, not this model's KV")

    @classmethod
    def open(
        cls,
        client: Client,
        model: PreTrainedModel,
        *,
        name: str,
        revision: str,
        tenant: str = "default",
        block_tokens: int = 64,
        adapter: str = "",
        salt: bytes = b"",
    ) -> PrefixCache:
        """The prefixes of ``model`` on ``client``, in a namespace of its own (made if absent).

        ``name`` and ``revision`` must name the weights: a commit, or ``weights_revision(model)``.
        The configuration, dtype and block size are part of the namespace's name, so that models
        that differ in any of them never meet.
        """
        layout = model_layout(
            model.config,
            dtype=str(model.dtype),
            name=name,
            revision=revision,
            adapter=adapter,
            block_tokens=block_tokens,
        )
        namespace = client.namespace(namespace_name(tenant, layout), layout, create=True)
        return cls(namespace, model.config, salt=salt)

    def new_cache(self) -> DynamicCache:
        """An empty cache for a prefill that shall be stored: its sliding layers keep what leaves
        the window. Costs the memory of a model without windows."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.config)
        for layer in self._layers(cache):
            if layer.is_sliding:
                # Made for speculative decoding, where tokens are taken back. What a query sees is
                # not changed by it.
                layer.activate_past_recording()
        return cache

    def store(self, token_ids: Any, past_key_values: DynamicCache) -> int:
        """Stores the full blocks of ``token_ids`` that kvfs lacks; returns how many those were.

        ``token_ids``: one sequence, 1-dimensional, whose first tokens ``past_key_values`` (batch 1)
        has seen. Tokens that it has not seen yet are not stored. Raises InvalidRequest if a sliding
        layer has dropped tokens of a block that is to be stored: use ``new_cache``, or store after
        every piece of a prefill that is shorter than the window.
        """
        step = self.layout.block_tokens
        layers = self._layers(past_key_values)
        seen = min(len(token_ids), int(past_key_values.get_seq_length()))
        keys = self._keys(token_ids[:seen])
        first = self.namespace.match(keys)
        if first == len(keys):
            return 0
        for number, layer in enumerate(layers):
            self._check_layer(number, layer, first * step)
        stored = 0
        for start, end in self._batches(first, len(keys)):
            buffers = self._pack(layers, start * step, end * step)
            stored += self.namespace.put(keys[start:end], buffers)
        return stored

    def load(self, token_ids: Any, *, device: str = "cpu") -> tuple[DynamicCache, int]:
        """The longest stored prefix of ``token_ids`` (one sequence, 1-dimensional): a cache that
        has seen the first ``n`` tokens, and ``n``. At least one token is left to compute, since its
        logits are what the caller goes on with. Without any stored prefix: an empty cache, 0.

        The cache's sliding layers hold the last window only; what is computed from here on can be
        stored with ``store``, as with ``new_cache``.
        """
        keys = self._keys(token_ids)
        matched = self.namespace.match(keys)
        while True:
            tokens = max(0, min(matched * self.layout.block_tokens, len(token_ids) - 1))
            planes = [_Plane(self.layout, w.first_needed(tokens), tokens) for w in self._windows]
            there = self._fill(planes, keys[: self._block_count(tokens)])
            if there is None:
                return self._assemble(planes, tokens, device), tokens
            matched = there  # evicted since the match: a shorter prefix is left

    def _keys(self, token_ids: Any) -> list[bytes]:
        return block_keys(token_ids, self.layout.block_tokens, self.salt)

    def _block_count(self, tokens: int) -> int:
        return -(-tokens // self.layout.block_tokens)

    def _batches(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        step = min(BATCH_BLOCKS_MAX, max(1, BATCH_BYTES // self.layout.block_bytes))
        for start in range(first, end, step):
            yield start, min(start + step, end)

    def _layers(self, cache: DynamicCache) -> list[Any]:
        """The layers of a cache, as many as the model has."""
        layers: list[Any] = list(cache.layers)
        if len(layers) != len(self._windows):
            detail = f"{len(layers)} layers, the model has {len(self._windows)}"
            raise InvalidRequest(detail=detail)
        return layers

    def _check_layer(self, number: int, layer: Any, first: int) -> None:
        """Raises InvalidRequest unless ``layer`` holds what the layout says, from token ``first``
        or an earlier one."""
        layout = self.layout
        for tensor in (layer.keys, layer.values):
            batch, heads, _, head_dim = tensor.shape
            found = (batch, heads, head_dim, str(tensor.dtype))
            expected = (1, layout.kv_heads, layout.head_dim, layout.dtype)
            if found != expected:
                detail = f"layer {number} has batch, heads, head_dim, dtype {found}, not {expected}"
                raise InvalidRequest(detail=detail)
        if _dropped(layer) > first:
            detail = f"layer {number} dropped {_dropped(layer)} tokens, {first} may be missing"
            raise InvalidRequest(detail=detail)

    def _pack(self, layers: list[Any], start: int, end: int) -> list[torch.Tensor]:
        """Tokens ``start`` to ``end`` as blocks, each one contiguous tensor."""
        import torch

        layout = self.layout
        count = (end - start) // layout.block_tokens
        shape = (layout.layers, 2, layout.kv_heads, layout.block_tokens, layout.head_dim)
        dtype = _torch_dtype(layout.dtype)
        blocks = torch.empty((count, *shape), dtype=dtype)
        for number, layer in enumerate(layers):
            dropped = _dropped(layer)
            for plane, tensor in enumerate((layer.keys, layer.values)):
                part = tensor[0, :, start - dropped : end - dropped]
                blocks[:, number, plane] = part.unflatten(1, (count, -1)).transpose(0, 1)
        return list(blocks.unbind())

    def _fill(self, planes: list[_Plane], keys: list[bytes]) -> int | None:
        """Copies stored blocks, straight from the arena, into the planes. None if all were there,
        else the number of the first that was not."""
        for start, end in self._batches(0, len(keys)):
            with self.namespace.get(keys[start:end]) as blocks:
                count = self._copy(planes, blocks, start)
            if count < end - start:
                return start + count
        return None

    def _copy(self, planes: list[_Plane], blocks: Sequence[memoryview | None], start: int) -> int:
        """How many blocks, the first of which is number ``start``, were there and copied."""
        layout = self.layout
        shape = (layout.layers, 2, layout.kv_heads, layout.block_tokens, -1)
        for place, view in enumerate(blocks):
            if view is None or len(view) != layout.block_bytes:
                return place
            block = np.frombuffer(view, np.uint8).reshape(shape)
            for plane, layer in zip(planes, block, strict=True):
                plane.copy(layer, (start + place) * layout.block_tokens)
        return len(blocks)

    def _assemble(self, planes: list[_Plane], tokens: int, device: str) -> DynamicCache:
        import torch

        cache = self.new_cache()
        if tokens == 0:
            return cache
        dtype = _torch_dtype(self.layout.dtype)
        for plane, layer in zip(planes, self._layers(cache), strict=True):
            kv = torch.from_numpy(plane.kv).view(dtype).unsqueeze(1).to(device)
            layer.lazy_initialization(kv[0], kv[1])
            layer.keys, layer.values = kv[0], kv[1]
            if layer.is_sliding:
                layer.cumulative_length = tokens
        return cache


class _Plane:
    """K and V of one layer, from token ``first`` to ``end``, as bytes: [2, heads, tokens, bytes of
    one head]."""

    def __init__(self, layout: KVLayout, first: int, end: int) -> None:
        self.first = first
        self.end = end
        head_bytes = layout.block_bytes // (
            layout.layers * 2 * layout.kv_heads * layout.block_tokens
        )
        self.kv: NDArray[np.uint8] = np.empty(
            (2, layout.kv_heads, end - first, head_bytes), np.uint8
        )

    def copy(self, block: NDArray[np.uint8], start: int) -> None:
        """Takes from a block that begins at token ``start`` what lies inside."""
        low, high = max(self.first, start), min(self.end, start + block.shape[2])
        if low < high:
            self.kv[:, :, low - self.first : high - self.first] = block[
                :, :, low - start : high - start
            ]


def model_layout(
    config: PretrainedConfig,
    *,
    dtype: str,
    name: str,
    revision: str,
    adapter: str = "",
    block_tokens: int = 64,
) -> KVLayout:
    """The layout of a model's blocks. ``dtype`` as torch prints it (``torch.bfloat16``). The
    revision is completed by a digest of the configuration. Raises InvalidRequest for models that
    PrefixCache does not take, and for blocks beyond BLOCK_BYTES_MAX."""
    text = config.get_text_config(decoder=True)
    layers = len(_layer_windows(config))
    kv_heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if block_tokens <= 0:
        raise InvalidRequest(detail=f"block_tokens={block_tokens}")
    block_bytes = (
        layers * 2 * kv_heads * block_tokens * int(head_dim) * _torch_dtype(dtype).itemsize
    )
    if block_bytes > BLOCK_BYTES_MAX:
        detail = f"blocks of {block_bytes} bytes; at most {BLOCK_BYTES_MAX}: fewer block_tokens"
        raise InvalidRequest(detail=detail)
    return KVLayout(
        block_tokens=block_tokens,
        block_bytes=block_bytes,
        dtype=dtype,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=int(head_dim),
        order=BLOCK_ORDER,
        model=name,
        revision=f"{revision}+config-{config_digest(config)}",
        adapter=adapter,
    )


def config_digest(config: PretrainedConfig) -> str:
    """16 hex digits of SHA-256 over the configuration, less its volatile fields."""
    fields = {k: v for k, v in config.to_dict().items() if k not in VOLATILE_CONFIG}
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_revision(model: PreTrainedModel) -> str:
    """SHA-256 over every parameter and buffer, for weights that have no name of their own. Reads
    them all: about a second a GB."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return "sha256-" + digest.hexdigest()


def namespace_name(tenant: str, layout: KVLayout) -> str:
    """``TENANT/MODEL-DIGEST``: the digest is over every field of the layout."""
    fields = json.dumps({f: getattr(layout, f) for f in layout.__struct_fields__}, sort_keys=True)
    digest = hashlib.sha256(fields.encode()).hexdigest()[:16]
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", layout.model).strip("-.")[:80] or "model"
    return f"{tenant}/{slug}-{digest}"


def _layer_windows(config: PretrainedConfig) -> list[_LayerWindow]:
    """One for each layer of a cache for ``config``, which is asked for it: transformers decides
    which layers have windows. Raises InvalidRequest for other kinds of layers."""
    from transformers import DynamicCache
    from transformers.cache_utils import (
        DynamicLayer,
        DynamicSlidingWindowLayer,
    )

    windows = []
    for number, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(_LayerWindow(int(layer.sliding_window)))
        elif type(layer) is DynamicLayer:
            windows.append(_LayerWindow(0))
        else:
            raise InvalidRequest(detail=f"layer {number} keeps a {type(layer).__name__}")
    if not windows:
        raise InvalidRequest(detail=f"{type(config).__name__} does not say how many layers it has")
    return windows


def _dropped(layer: Any) -> int:
    """Tokens that a cache layer has seen and keeps no more."""
    return int(layer.get_seq_length()) - int(layer.keys.shape[-2])


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise InvalidRequest(detail=f"not a torch dtype: {name!r}")
    return found


__all__ = [
    "BLOCK_ORDER",
    "PrefixCache",
    "config_digest",
    "model_layout",
    "namespace_name",
    "weights_revision",
]
