"""PrefixCache on a real kvfs, and the processes of `kvfs demo-llm`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from rich.console import Console

import kvfs
from kvfs_base.errors import LayoutMismatch
from kvfs_base.limits import MIB
from kvfs_tools.demo_llm import Workers, cuts_for, read_document
from kvfs_tools.stage import Stage, Teller

needs_fuse = pytest.mark.skipif(
    not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    parent = str(tmp_path_factory.mktemp("stage"))
    with Stage(capacity_bytes=64 * MIB, arena_bytes=32 * MIB, parent=parent) as stage:
        yield stage.directory


@needs_fuse
@pytest.mark.llm
def test_one_client_stores_another_one_loads(directory: Path) -> None:
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    from kvfs.integrations.transformers import PrefixCache, weights_revision

    torch.set_num_threads(1)
    torch.manual_seed(5)
    config = transformers.Gemma3TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=20,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    identity = {"name": "tiny/model", "revision": weights_revision(model), "block_tokens": 8}
    ids = torch.randint(2, 97, (61,))
    with kvfs.connect(directory) as one, kvfs.connect(directory) as two:
        writer = PrefixCache.open(one, model, **identity)
        cache = writer.new_cache()
        model(ids[None], cache=cache)
        assert writer.store(ids, cache) == 7
        assert writer.store(ids, cache) == 0
        reader = PrefixCache.open(two, model, **identity)
        loaded, known = reader.load(ids)
        assert known == 56
        for mine, theirs in zip(loaded.layers, cache.layers, strict=True):
            first = known - mine.keys.shape[-2]
            assert torch.equal(mine.keys, theirs.keys[:, :, first:known])
            assert torch.equal(mine.values, theirs.values[:, :, first:known])
        assert PrefixCache.open(two, model, **identity, adapter="x").load(ids)[1] == 0
        assert PrefixCache.open(two, model, **identity, salt=b"x").load(ids)[1] == 0
        name = reader.namespace.name  # type: ignore[attr-defined]
        with pytest.raises(LayoutMismatch):
            two.namespace(name, kvfs.KVLayout(block_tokens=8), create=True)


def test_cuts_lie_inside_at_and_behind_the_window() -> None:
    assert cuts_for(2048, 512) == [256, 552, 1543]
    assert cuts_for(300, 512) == [232, 256]


def test_the_default_document_is_long(tmp_path: Path) -> None:
    assert len(read_document(None)) > 16_000
    (tmp_path / "text").write_bytes(b"caf\xe9")
    assert read_document(str(tmp_path / "text")).startswith("caf")


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    workers = Workers(tmp_path / "log", Teller(Console(quiet=True)))
    with pytest.raises(click.ClickException, match="no job 'absent'"):
        workers.run(("absent", {}))
