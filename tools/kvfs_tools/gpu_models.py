"""Models with random weights for the benchmark of the first token, and caches with room.

Shapes are those of real models; what the weights are does not change how long anything takes. The
attention is torch's flash kernel with a causal mask aligned to the end, for prompts whose first
tokens are cached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvfs_base.errors import InvalidRequest

ATTENTION = "kvfs_causal"

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 65536,
}
# DeepSeek-V2-Lite's attention and widths. The feed-forward layers are dense, which computes as much
# as the experts that a token of it activates.
MLA_LITE = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 27,
    "first_k_dense_replace": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 102400,
    "max_position_embeddings": 65536,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b-shape": ("Llama", LLAMA_8B),
    "deepseek-mla-shape": ("DeepseekV3", MLA_LITE),
}


def causal_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """[batch, heads, tokens, dim]; the last query sees every key. As transformers' interface."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    width = value.shape[-1]
    if width < key.shape[-1]:  # the flash kernel wants one width
        value = torch.nn.functional.pad(value, (0, key.shape[-1] - width))
    if query.is_cuda:
        # What the bias below comes to, without its checks: 0.1 ms a layer, as much as the rest.
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, query.shape[2] > 1, False, scale=scaling
        )[0]
    else:
        from torch.nn.attention.bias import causal_lower_right  # 1.5 s, for those who need it

        mask = causal_lower_right(query.shape[2], key.shape[2]) if query.shape[2] > 1 else None
        found = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling
        )
    return found[..., :width].transpose(1, 2).contiguous(), None


def make_model(name: str, device: str, shape: dict[str, Any] | None = None) -> Any:
    """A model of SHAPES in bfloat16 with random weights; ``shape`` overrides its sizes."""
    transformers.AttentionInterface.register(ATTENTION, causal_attention)
    family, full = SHAPES[name]
    config = getattr(transformers, f"{family}Config")(**{**full, **(shape or {})})
    config._attn_implementation = ATTENTION
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = getattr(transformers, f"{family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(default)
    generator = torch.Generator(device=device).manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
    return model.eval()


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer of a cache whose memory is there from the start: new tokens are written behind the
    old ones, and nothing is copied when it grows."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.all_keys = keys
        self.all_values = values
        self.before_use: Callable[[], None] | None = None
        """Called before old tokens are looked at, and after what is computed without them."""
        self.crop_to(0)
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def crop_to(self, tokens: int) -> None:
        """Has seen the first ``tokens``, which its memory holds (or will, when they are used)."""
        self.seen = tokens
        self.keys = self.all_keys[:, :, :tokens]
        self.values = self.all_values[:, :, :tokens]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.before_use is not None:
            self.before_use()
        start = self.seen
        end = start + key_states.shape[2]
        if end > self.all_keys.shape[2]:
            raise InvalidRequest(detail=f"{end} tokens, room for {self.all_keys.shape[2]}")
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.crop_to(end)
        return self.all_keys[:, :, :end], self.all_values[:, :, :end]


class RoomyCache:
    """A cache for ``tokens`` of a model, and its tensors: K and V a layer, or latent and rotary
    part."""

    def __init__(self, model: Any, tokens: int) -> None:
        config = model.config
        if getattr(config, "kv_lora_rank", None):
            shapes = [(1, config.kv_lora_rank), (1, config.qk_rope_head_dim)]
        else:
            head = getattr(config, "head_dim", None)
            head = head or config.hidden_size // config.num_attention_heads
            shapes = [(config.num_key_value_heads, head)] * 2
        self.token_bytes = config.num_hidden_layers * sum(2 * h * d for h, d in shapes)
        self.pairs: list[Any] = [
            tuple(
                torch.zeros((1, heads, tokens, dim), dtype=torch.bfloat16, device=model.device)
                for heads, dim in shapes
            )
            for _ in range(config.num_hidden_layers)
        ]
        self.cache = DynamicCache(config=config)
        self.layers = [RoomyLayer(*pair) for pair in self.pairs]
        self.cache.layers = list(self.layers)

    def crop_to(self, tokens: int) -> None:
        for layer in self.layers:
            layer.crop_to(tokens)

    def fill(self, value: float) -> None:
        for pair in self.pairs:
            for tensor in pair:
                tensor.fill_(value)


@torch.no_grad()
def first_token(model: Any, cache: RoomyCache, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits [vocabulary] behind ``token_ids`` [tokens], which follow what the cache has seen.
    Raises InvalidRequest if the model did not look at it: releases of transformers before 5.24 take
    it under another name, and ignore names that they do not know."""
    wanted = cache.layers[0].seen + len(token_ids)
    hidden = model.model(input_ids=token_ids[None], cache=cache.cache, use_cache=True)[0]
    if cache.layers[0].seen != wanted:
        raise InvalidRequest(detail=f"transformers {transformers.__version__} ignores the cache")
    logits: torch.Tensor = model.lm_head(hidden[0, -1:])[0]
    return logits


__all__ = ["SHAPES", "RoomyCache", "first_token", "make_model"]
