"""The benchmark of the first token runs, on the CPU and with tiny models, so that it cannot rot;
what it loads is what was computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.llm

from kvfs_base.errors import InvalidRequest  # noqa: E402
from kvfs_tools.bench_ttft import TINY, bench_ttft  # noqa: E402
from kvfs_tools.gpu_models import RoomyCache, first_token, make_model  # noqa: E402


@pytest.mark.parametrize("model", ["llama-3-8b-shape", "deepseek-mla-shape"])
def test_loaded_prefixes_are_what_was_computed(tmp_path: Path, model: str) -> None:
    out = tmp_path / "rows.json"
    options = ["--dir", str(tmp_path), "--device", "cpu", "--tiny", "--rounds", "1"]
    options += ["--model", model, "--tokens", "192", "--arena-mib", "128", "--json", str(out)]
    result = CliRunner().invoke(bench_ttft, options)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["versions"]["transformers"]
    rows = found["rows"]
    assert [(row["path"], row["stored_fraction"]) for row in rows] == [
        ("compute", 0.0),
        *((path, share) for path in ("arena", "disk") for share in (0.5, 0.9, 1.0)),
    ]
    assert all(row["ttft_s"] > 0 for row in rows)
    assert all(row["kv_bit_equal"] and row["next_tokens_equal"] for row in rows[1:])
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_a_model_that_ignores_its_cache_is_refused() -> None:
    """What transformers before 5.24 does with an argument that it does not know: a benchmark would
    measure forward passes that do not see what was loaded."""
    config = TINY["Llama"]
    model = make_model("llama-3-8b-shape", "cpu", config)
    cache = RoomyCache(model, 64)
    ids = torch.arange(48) % 512
    assert first_token(model, cache, ids[:32]).shape == (512,)
    forward = model.model.forward
    model.model.forward = lambda input_ids, **_: forward(input_ids=input_ids)
    with pytest.raises(InvalidRequest, match="ignores the cache"):
        first_token(model, cache, ids[32:])
