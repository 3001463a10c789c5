"""PrefixCache with tiny random models: restored KV is bit-equal, greedy tokens are those of a run
without it, for every place where a prompt may leave the stored text."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

from kvfs.buffers import byte_view  # noqa: E402
from kvfs.integrations.transformers import (  # noqa: E402
    PrefixCache,
    model_layout,
    namespace_name,
    weights_revision,
)
from kvfs_base.errors import InvalidRequest  # noqa: E402
from kvfs_base.types import KVLayout  # noqa: E402

pytestmark = pytest.mark.llm

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

BLOCK = 8
WINDOW = 20
LENGTH = 61
VOCABULARY = 97


class MemoryNamespace:
    """A namespace in a dict; leases are counted, and views die with them."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.blocks: dict[bytes, bytes] = {}
        self.vanish: list[bytes] = []

    def match(self, keys: Sequence[bytes]) -> int:
        return sum(1 for _ in itertools.takewhile(self.blocks.__contains__, keys))

    def put(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> int:
        new = 0
        for key, buffer in zip(keys, buffers, strict=True):
            view = byte_view(buffer)
            assert len(view) == self.layout.block_bytes
            if key not in self.blocks:
                self.blocks[key] = bytes(view)
                new += 1
        return new

    @contextlib.contextmanager
    def get(self, keys: Sequence[bytes]) -> Iterator[list[memoryview | None]]:
        while self.vanish:
            self.blocks.pop(self.vanish.pop(), None)
        found = [self.blocks.get(k) for k in keys]
        views = [None if b is None else memoryview(b) for b in found]
        yield views
        for view in views:
            if view is not None:
                view.release()  # BufferError if anybody kept it


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def config_of(kind: str) -> Any:
    if kind == "gemma3":
        types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
        return transformers.Gemma3TextConfig(
            **COMMON,
            head_dim=8,
            num_hidden_layers=4,
            layer_types=types,
            sliding_window=WINDOW,
        )
    if kind == "mistral":
        return transformers.MistralConfig(**COMMON, num_hidden_layers=3, sliding_window=WINDOW)
    return transformers.LlamaConfig(**COMMON, num_hidden_layers=3)


KINDS = ["gemma3", "mistral", "llama"]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    found = transformers.AutoModelForCausalLM.from_config(config_of(request.param))
    return found.eval().requires_grad_(False)


def tokens_of(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(2, VOCABULARY, (count,), generator=generator).tolist()
    return found


def prefixes_of(model: Any, **changes: Any) -> PrefixCache:
    identity: dict[str, Any] = {"name": "tiny", "revision": "1", "block_tokens": BLOCK} | changes
    layout = model_layout(model.config, dtype=str(model.dtype), **identity)
    return PrefixCache(MemoryNamespace(layout), model.config)


def memory(prefixes: PrefixCache) -> MemoryNamespace:
    assert isinstance(prefixes.namespace, MemoryNamespace)
    return prefixes.namespace


def prefill(model: Any, ids: list[int], cache: Any, pieces: int = 0) -> Any:
    """Runs ``ids`` through the model, all at once or in pieces; the logits of the last token."""
    step = pieces or len(ids)
    for start in range(0, len(ids), step):
        part = torch.tensor([ids[start : start + step]])
        out = model(part, cache=cache, use_cache=True, logits_to_keep=1)
    return out.logits[0, -1]


def greedy(model: Any, ids: list[int], cache: Any, known: int, count: int = 12) -> list[int]:
    found: list[int] = []
    todo = ids[known:]
    for _ in range(count):
        logits = prefill(model, todo, cache)
        found.append(int(logits.argmax()))
        todo = found[-1:]
    return found


@pytest.fixture
def stored(model: Any) -> tuple[Any, PrefixCache, Any, list[int]]:
    """A model, its prefixes with one text stored, the cache it came from, and the text."""
    ids = tokens_of(LENGTH)
    prefixes = prefixes_of(model)
    cache = prefixes.new_cache()
    prefill(model, ids, cache)
    assert prefixes.store(ids, cache) == LENGTH // BLOCK
    return model, prefixes, cache, ids


def assert_same_kv(restored: Any, captured: Any, known: int) -> None:
    for mine, theirs in zip(restored.layers, captured.layers, strict=True):
        assert mine.get_seq_length() == known
        window = getattr(mine, "sliding_window", None)
        first = max(0, known - window + 1) if window else 0
        assert mine.keys.shape[-2] == known - first
        assert torch.equal(mine.keys, theirs.keys[:, :, first:known])
        assert torch.equal(mine.values, theirs.values[:, :, first:known])


@pytest.mark.parametrize("cut", [BLOCK, 2 * BLOCK, 19, 20, 21, 3 * BLOCK, 40, LENGTH - 1])
def test_any_cut_restores_bits_and_tokens(
    stored: tuple[Any, PrefixCache, Any, list[int]], cut: int
) -> None:
    """Cuts inside, at and beyond the window, at and off the edges of blocks."""
    model, prefixes, captured, ids = stored
    prompt = ids[:cut] + tokens_of(15, seed=cut)
    prompt[cut] = (ids[cut] + 1) % VOCABULARY  # leaves the stored text exactly here
    cache, known = prefixes.load(prompt)
    assert known == cut // BLOCK * BLOCK > 0
    assert_same_kv(cache, captured, known)
    plain = transformers.DynamicCache(config=model.config)
    assert greedy(model, prompt, cache, known) == greedy(model, prompt, plain, 0)


def test_logits_are_close_to_those_of_a_plain_run(
    stored: tuple[Any, PrefixCache, Any, list[int]],
) -> None:
    model, prefixes, _, ids = stored
    prompt = ids[:48] + tokens_of(30, seed=9)
    cache, known = prefixes.load(prompt)
    mine = prefill(model, prompt[known:], cache)
    plain = prefill(model, prompt, transformers.DynamicCache(config=model.config))
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


def test_a_whole_stored_prompt_leaves_one_token_to_compute(
    stored: tuple[Any, PrefixCache, Any, list[int]],
) -> None:
    model, prefixes, captured, ids = stored
    prompt = ids[: 5 * BLOCK]
    cache, known = prefixes.load(prompt)
    assert known == len(prompt) - 1
    assert_same_kv(cache, captured, known)
    plain = transformers.DynamicCache(config=model.config)
    assert greedy(model, prompt, cache, known) == greedy(model, prompt, plain, 0)
    assert prefixes.load(ids[:1])[1] == prefixes.load([])[1] == 0


def test_generate_takes_the_restored_cache(
    stored: tuple[Any, PrefixCache, Any, list[int]],
) -> None:
    model, prefixes, _, ids = stored
    prompt = torch.tensor([ids[:50] + tokens_of(5, seed=4)])
    cache, known = prefixes.load(prompt[0])
    assert known == 48
    settings = {"max_new_tokens": 10, "do_sample": False, "attention_mask": prompt * 0 + 1}
    with_cache = model.generate(prompt, cache=cache, **settings)
    assert with_cache.tolist() == model.generate(prompt, **settings).tolist()


def test_a_conversation_grows_block_by_block(
    stored: tuple[Any, PrefixCache, Any, list[int]],
) -> None:
    """Load, go on, store, again: what was computed behind a restored prefix restores as well."""
    model, prefixes, _, ids = stored
    longer = ids[:40] + tokens_of(33, seed=5)
    cache, known = prefixes.load(longer)
    prefill(model, longer[known:], cache)
    assert prefixes.store(longer, cache) == len(longer) // BLOCK - 5
    assert prefixes.store(longer, cache) == 0
    again, known = prefixes.load([*longer, 3])
    assert known == len(longer) // BLOCK * BLOCK
    plain = transformers.DynamicCache(config=model.config)
    assert greedy(model, [*longer, 3], again, known) == greedy(model, [*longer, 3], plain, 0)


def test_a_prefill_in_pieces_stores_the_same_blocks(model: Any) -> None:
    ids = tokens_of(LENGTH)
    prefixes = prefixes_of(model)
    cache = prefixes.new_cache()
    prefill(model, ids, cache, pieces=13)
    prefixes.store(ids, cache)
    loaded, known = prefixes.load(ids)
    assert known == 56
    assert_same_kv(loaded, cache, known)


def test_an_ordinary_cache_can_be_stored_piece_by_piece(model: Any) -> None:
    """Without recording, a layer keeps window - 1 tokens: pieces that fit, stored as they come."""
    ids = tokens_of(LENGTH)
    prefixes = prefixes_of(model)
    cache = transformers.DynamicCache(config=model.config)
    recorded = prefixes.new_cache()
    total = 0
    for start in range(0, LENGTH, BLOCK):
        part = ids[start : start + BLOCK]
        prefill(model, part, cache)
        prefill(model, part, recorded)
        total += prefixes.store(ids, cache)
    assert total == LENGTH // BLOCK
    loaded, known = prefixes.load(ids)
    assert_same_kv(loaded, recorded, known)


@pytest.mark.parametrize("model", ["gemma3", "mistral"], indirect=True)
def test_dropped_tokens_are_refused(model: Any) -> None:
    ids = tokens_of(LENGTH)
    prefixes = prefixes_of(model)
    cache = transformers.DynamicCache(config=model.config)
    prefill(model, ids, cache)
    with pytest.raises(InvalidRequest, match="dropped 42 tokens"):
        prefixes.store(ids, cache)
    assert memory(prefixes).blocks == {}


@pytest.mark.parametrize("which", [0, 3, 6])
def test_a_block_that_vanishes_after_the_match_shortens_the_prefix(
    stored: tuple[Any, PrefixCache, Any, list[int]], which: int
) -> None:
    _, prefixes, captured, ids = stored
    keys = list(memory(prefixes).blocks)
    memory(prefixes).vanish.append(keys[which])
    cache, known = prefixes.load(ids)
    assert known == which * BLOCK
    if known:
        assert_same_kv(cache, captured, known)


def test_tokens_that_the_cache_has_not_seen_are_not_stored(model: Any) -> None:
    ids = tokens_of(LENGTH)
    prefixes = prefixes_of(model)
    cache = prefixes.new_cache()
    prefill(model, ids[:30], cache)
    assert prefixes.store(ids, cache) == 3
    assert prefixes.store(torch.tensor(ids), cache) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_bit_equal(model: Any, dtype: str) -> None:
    model = model.to(getattr(torch, dtype))
    ids = tokens_of(LENGTH)
    prefixes = prefixes_of(model)
    cache = prefixes.new_cache()
    prefill(model, ids, cache)
    prefixes.store(ids, cache)
    loaded, known = prefixes.load(ids)
    assert loaded.layers[0].keys.dtype == getattr(torch, dtype)
    assert_same_kv(loaded, cache, known)


def test_many_batches(stored: tuple[Any, PrefixCache, Any, list[int]], monkeypatch: Any) -> None:
    model, prefixes, captured, ids = stored
    monkeypatch.setattr("kvfs.integrations.transformers.BATCH_BYTES", 1)
    loaded, known = prefixes.load(ids)
    assert_same_kv(loaded, captured, known)
    other = prefixes_of(model)
    other.store(ids, captured)
    assert memory(other).blocks == memory(prefixes).blocks


def test_a_block_is_laid_out_as_documented(
    stored: tuple[Any, PrefixCache, Any, list[int]],
) -> None:
    """layer, K or V, head, token, dim: docs/transformers.md says so."""
    _, prefixes, captured, _ = stored
    layout = prefixes.layout
    block = torch.frombuffer(
        bytearray(list(memory(prefixes).blocks.values())[2]), dtype=torch.float32
    )
    shaped = block.view(layout.layers, 2, layout.kv_heads, BLOCK, layout.head_dim)
    span = slice(2 * BLOCK, 3 * BLOCK)
    for number, layer in enumerate(captured.layers):
        assert torch.equal(shaped[number, 0], layer.keys[0, :, span])
        assert torch.equal(shaped[number, 1], layer.values[0, :, span])


def test_wrong_caches_are_refused(model: Any) -> None:
    ids = tokens_of(LENGTH)
    prefixes = prefixes_of(model)
    with pytest.raises(InvalidRequest, match="layers"):
        prefixes.store(ids, transformers.DynamicCache())
    cache = prefixes.new_cache()
    model(torch.tensor([ids, ids]), cache=cache)
    with pytest.raises(InvalidRequest, match="batch"):
        prefixes.store(ids, cache)


def test_salts_and_identities_do_not_meet() -> None:
    """The key is complete: whatever changes the KV changes the namespace."""
    config = config_of("gemma3")
    base: dict[str, Any] = {
        "dtype": "torch.float32",
        "name": "m",
        "revision": "1",
        "adapter": "",
        "block_tokens": 8,
    }
    changes = {
        "dtype": "torch.bfloat16",
        "name": "n",
        "revision": "2",
        "adapter": "lora",
        "block_tokens": 16,
    }
    names = {namespace_name("t", model_layout(config, **base))}
    names |= {
        namespace_name("t", model_layout(config, **base | {k: v})) for k, v in changes.items()
    }
    config.rope_parameters["full_attention"]["rope_theta"] = 5.0
    names.add(namespace_name("t", model_layout(config, **base)))
    names.add(namespace_name("u", model_layout(config, **base)))
    assert len(names) == len(changes) + 3


def test_a_salt_hides_blocks(stored: tuple[Any, PrefixCache, Any, list[int]]) -> None:
    model, prefixes, _, ids = stored
    other = PrefixCache(prefixes.namespace, model.config, salt=b"tenant")
    assert other.load(ids)[1] == 0
    assert prefixes.load(ids)[1] > 0


def test_a_namespace_of_another_model_is_refused(model: Any) -> None:
    layout = KVLayout(block_tokens=BLOCK, layers=99)
    with pytest.raises(InvalidRequest):
        PrefixCache(MemoryNamespace(layout), model.config)


@pytest.mark.parametrize(
    "wrong", [{"block_tokens": 0}, {"dtype": "torch.float99"}, {"block_tokens": 1 << 22}]
)
def test_impossible_layouts_are_refused(wrong: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"dtype": "torch.float32", "name": "m", "revision": "1"} | wrong
    with pytest.raises(InvalidRequest):
        model_layout(config_of("llama"), **settings)


def test_the_name_of_weights_follows_every_byte(model: Any) -> None:
    before = weights_revision(model)
    assert before == weights_revision(model)
    parameter = next(iter(model.parameters()))
    parameter[0, 0] += 1
    assert weights_revision(model) != before


def test_state_space_models_are_refused() -> None:
    config = transformers.MambaConfig(num_hidden_layers=2)
    with pytest.raises(InvalidRequest):
        model_layout(config, dtype="torch.float32", name="m", revision="1")
