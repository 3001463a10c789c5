"""``kvfs bench-ttft``: the time to the first token with a prefix from kvfs, or without.

A model of a real shape with random weights runs prompts of several lengths, of which none, a part
or all is stored. Measured is everything between the token ids and the next token: keys, look-up,
load, and the forward pass of what is left, whose layers wait for theirs. ``arena`` finds the blocks
in the arena of the node agent, ``disk`` through an agent whose arena holds something else.

Rows are {model, path, tokens, stored_fraction, ttft_s, recompute_s, speedup, load_s, rule, ...}.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

import kvfs
from kvfs_base.limits import MIB
from kvfs_gds.choice import LoadOrCompute
from kvfs_gds.device import Device, open_device
from kvfs_gds.load import Pages
from kvfs_gds.loader import Loader
from kvfs_gds.paged import PagedLayout
from kvfs_tools import gpu_plot
from kvfs_tools.bench_gpu import write
from kvfs_tools.cluster import LocalCluster
from kvfs_tools.gpu_rig import device_name, small_agent

FRACTIONS = (0.5, 0.9, 1.0)
PLACES = ("arena", "disk")
BLOCK_TOKENS = 64
CALIBRATION = (1024, 4096, 16384)
"""Lengths from which the rule learns; other ones than those it is tested with."""

TAUGHT_ROUNDS = 5
"""Prefills of each length that the rule sees, in turns with those of a last token: how long kernels
take to be queued drifts by a fifth."""

LEARNT_ROUNDS = 3
"""Prompts like the one in question that the rule has seen: one alone may have been late."""

NEXT_TOKENS = 4

FLUSHES = 3
"""Turns in which blocks have to be out of an arena."""

OVERLAP_ROUNDS = 9
"""Where half is stored: what is hidden is the difference of two forward passes. And of prompts that
are short, whose times drift."""

SHORT_OVERLAP_ROUNDS = 25
"""Both: half is stored of a short prompt."""

PAIRED_TOKENS_MAX = 8192
"""Up to this length each round of a row computes the prompt once more: short times drift."""

DISK_ROUNDS = 3
"""Each takes seconds, and another load in between, which makes it cold."""


@dataclasses.dataclass
class Place:
    """Where blocks come from: a namespace of some agent, its loader, and how it is made cold."""

    name: str
    namespace: kvfs.Namespace
    loader: Loader
    before: Callable[[], object]


class Bench:
    """One model, its cache, and its blocks in kvfs."""

    def __init__(
        self, name: str, tokens: int, device: Device, shape: dict[str, Any] | None
    ) -> None:
        import torch

        from kvfs_tools.gpu_models import RoomyCache, make_model

        self.torch = torch
        self.name = name
        self.device = device
        self.on_gpu = device.name != "cpu"
        if self.on_gpu:
            torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
        self.model = make_model(name, "cuda" if self.on_gpu else "cpu", shape)
        self.cache = RoomyCache(self.model, tokens)
        self.ids = np.random.default_rng(5).integers(0, self.model.config.vocab_size, tokens)
        self.device_ids = torch.from_numpy(self.ids).to(self.model.device)
        self.layout = PagedLayout.heads_first(self.cache.pairs, BLOCK_TOKENS)
        self.block_bytes = self.layout.block_bytes(1)
        self.keys = kvfs.block_keys(self.ids, BLOCK_TOKENS)
        self.rule = LoadOrCompute(self.layout.layers)
        self.waiting: Any = None
        self.stream = self._stream()
        """What all is computed on: to ask torch for it takes 20 us, and there are many layers."""
        gc.collect()
        gc.freeze()  # as engines do: a collection takes longer than a short forward pass
        # Where vLLM's connectors wait, too: at the attention, behind the projections.
        for number, layer in enumerate(self.cache.layers):
            layer.before_use = partial(self._wait_layer, number)

    def _wait_layer(self, number: int) -> None:
        if self.waiting is not None:
            self.waiting.wait_layer(number, self.stream)

    def _stream(self) -> Any:
        return self.torch.cuda.current_stream() if self.on_gpu else None

    def synchronize(self) -> None:
        if self.on_gpu:
            self.torch.cuda.synchronize()

    def pages(self, blocks: int) -> Pages:
        return Pages(self.layout, np.arange(blocks, dtype=np.int32).reshape(-1, 1))

    def logits(self, start: int, end: int) -> Any:
        """Computes tokens ``start`` to ``end`` behind what the cache holds before them."""
        from kvfs_tools.gpu_models import first_token

        self.cache.crop_to(start)
        return first_token(self.model, self.cache, self.device_ids[start:end])

    def compute(self, tokens: int) -> int:
        """The first token without kvfs."""
        return int(self.logits(0, tokens).argmax())

    def load(self, place: Place, tokens: int, stored: int, *, overlap: bool = True) -> int:
        """The first token of a prompt of ``tokens`` whose first ``stored`` are in kvfs. What
        matched is expected to come, and looked for in the end: a block that went meanwhile would
        cost another forward pass."""
        keys = kvfs.block_keys(self.ids[:stored], BLOCK_TOKENS)
        count = place.namespace.match(keys)
        load = place.loader.load(keys[:count], self.pages(count), after=self.stream)
        start = min(count * BLOCK_TOKENS, tokens - 1)
        if not overlap:
            load.result()
        self.waiting = load if overlap else None
        try:
            token = int(self.logits(start, tokens).argmax())
        finally:
            self.waiting = None
        if count * BLOCK_TOKENS != stored or not all(load.result()):
            raise RuntimeError("a block was missing")
        return token

    # --- figures

    def seconds(
        self,
        rounds: int,
        bodies: dict[str, Callable[[], object]],
        before: Callable[[], object],
    ) -> dict[str, list[float]]:
        """Seconds of each body, which take turns, after one turn that is not counted: what drifts
        meanwhile changes them all. Each comes as often behind every other one, since a GPU is
        slower for a while after it has computed."""
        taken: dict[str, list[float]] = {name: [] for name in bodies}
        orders = itertools.cycle(balanced(list(bodies)))
        for names in itertools.islice(orders, rounds + 1):
            for name in names:
                before()
                taken[name].append(self._timed(bodies[name]))
        return {name: found[1:] for name, found in taken.items()}

    def _timed(self, body: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        body()
        self.synchronize()
        return time.perf_counter() - start

    def median(
        self, rounds: int, body: Callable[[], object], before: Callable[[], object]
    ) -> float:
        """Seconds of ``body``, after one run that is not counted."""
        return statistics.median(self.seconds(rounds, {"body": body}, before)["body"])

    def load_alone(self, place: Place, stored: int) -> None:
        blocks = stored // BLOCK_TOKENS
        place.loader.load(self.keys[:blocks], self.pages(blocks)).result()

    def teach(self, places: list[Place], tokens_max: int) -> None:
        """Lets the rule see prefills and loads."""
        for tokens in (t for t in CALIBRATION if t <= tokens_max):
            bodies: dict[str, Callable[[], object]]
            bodies = {"whole": partial(self.compute, tokens), "tail": partial(self._tail, tokens)}
            taken = self.seconds(TAUGHT_ROUNDS, bodies, nothing)
            for whole, tail in zip(taken["whole"], taken["tail"], strict=True):
                self.rule.observe_compute(tokens, 0, whole)
                self.rule.observe_compute(1, tokens - 1, tail)
            for place in places:
                seconds = self.median(2, partial(self.load_alone, place, tokens), place.before)
                nbytes = tokens // BLOCK_TOKENS * self.block_bytes
                self.rule.observe_load(nbytes, seconds, from_disk=place.name == "disk")
        first = places[0]
        for tokens in (t for t in CALIBRATION if t <= tokens_max):
            for share in (2, 1):
                stored = tokens // share // BLOCK_TOKENS * BLOCK_TOKENS
                nbytes = stored // BLOCK_TOKENS * self.block_bytes
                seconds = self.median(2, partial(self.load, first, tokens, stored), first.before)
                sizes = (0, nbytes) if first.name == "disk" else (nbytes, 0)
                self.rule.observe_first_token(tokens, stored, *sizes, seconds)

    def _tail(self, tokens: int) -> int:
        return int(self.logits(tokens - 1, tokens).argmax())

    def row(
        self, place: Place, tokens: int, fraction: float, recompute: float, rounds: int
    ) -> dict[str, Any]:
        stored = int(tokens * fraction) // BLOCK_TOKENS * BLOCK_TOKENS
        checks = self.check(place, tokens, stored)
        nbytes = stored // BLOCK_TOKENS * self.block_bytes
        sizes = (0, nbytes) if place.name == "disk" else (nbytes, 0)
        self.learn(place, tokens, stored, sizes)
        loads = self.rule.should_load(tokens, stored, *sizes)
        estimate = self._estimate(tokens, stored, *sizes)
        bodies: dict[str, Callable[[], object]]
        bodies = {"ttft": partial(self.load, place, tokens, stored)}
        if tokens <= PAIRED_TOKENS_MAX:
            bodies["compute"] = partial(self.compute, tokens)
        before = place.before
        if place.name == "disk":
            rounds = min(rounds, DISK_ROUNDS)
        else:
            # A GPU that has just computed for a second is slower than one that has not: each comes
            # behind the same load.
            before = partial(self.load_alone, place, stored)
            short, half = tokens <= PAIRED_TOKENS_MAX, fraction == FRACTIONS[0]
            if short or half:
                rounds = max(rounds, SHORT_OVERLAP_ROUNDS if short and half else OVERLAP_ROUNDS)
            bodies["alone"] = partial(self.load_alone, place, stored)
            bodies["rest"] = partial(self._suffix, place, tokens, stored)
        taken = self.seconds(rounds, bodies, before)
        ttft = statistics.median(taken["ttft"])
        computed = taken.get("compute", [recompute] * rounds)
        recompute = statistics.median(computed)
        # How fast kernels are queued drifts: what was measured in one turn is compared.
        speedup = statistics.median(c / t for c, t in zip(computed, taken["ttft"], strict=True))
        lost = 1 / speedup if loads else speedup
        return {
            **self.head(place.name, tokens, fraction, ttft, recompute),
            "speedup": round(speedup, 2),
            "rounds": rounds,
            "loaded_bytes": nbytes,
            **_overlap(taken),
            **estimate,
            "rule": "load" if loads else "compute",
            "rule_loses": round(max(0.0, lost - 1), 4),
            **checks,
        }

    def learn(self, place: Place, tokens: int, stored: int, sizes: tuple[int, int]) -> None:
        """What the rule sees of prompts like this one before it decides: their loads, and from the
        arena what they take to compute, and their first tokens. Loads from disk take seconds: of
        those one."""
        for _ in range(1 if place.name == "disk" else LEARNT_ROUNDS):
            place.before()
            once = self._timed(partial(self.load_alone, place, stored))
            self.rule.observe_load(sum(sizes), once, from_disk=place.name == "disk")
            if place.name == "arena":
                self.rule.observe_compute(tokens, 0, self._timed(partial(self.compute, tokens)))
                once = self._timed(partial(self.load, place, tokens, stored))
                self.rule.observe_first_token(tokens, stored, *sizes, once)

    def _estimate(self, *prompt: int) -> dict[str, float]:
        """What the rule expected."""
        found = self.rule.estimate(*prompt)
        if found is None:
            return {}
        return {"expected_s": round(found.load, 5), "expected_compute_s": round(found.compute, 5)}

    def _suffix(self, place: Place, tokens: int, stored: int) -> int:
        """As ``load``, with the prefix in the cache already: keys and look-up are counted."""
        keys = kvfs.block_keys(self.ids[:stored], BLOCK_TOKENS)
        place.namespace.match(keys)
        return int(self.logits(min(stored, tokens - 1), tokens).argmax())

    def head(
        self, path: str, tokens: int, fraction: float, ttft: float, recompute: float
    ) -> dict[str, Any]:
        return {
            "model": self.name,
            "path": path,
            "tokens": tokens,
            "stored_fraction": fraction,
            "ttft_s": round(ttft, 5),
            "recompute_s": round(recompute, 5),
            "speedup": round(recompute / ttft, 2),
        }

    def check(self, place: Place, tokens: int, stored: int) -> dict[str, bool]:
        """Loaded K and V against the computed ones, bit for bit; what follows from either, too."""
        torch = self.torch
        start = min(stored, tokens - 1)
        whole = self.logits(0, tokens)
        kept = [tuple(t[:, :, :stored].clone() for t in pair) for pair in self.cache.pairs]
        computed = self._next_tokens(start, tokens)
        self.cache.fill(float("nan"))
        self.synchronize()
        place.before()
        self.load(place, tokens, stored)
        # The last token of a prompt that is stored whole is computed again, over its own K and V.
        same = all(
            torch.equal(t[:, :, :start].view(torch.int16), k[:, :, :start].view(torch.int16))
            for pair, kept_pair in zip(self.cache.pairs, kept, strict=True)
            for t, k in zip(pair, kept_pair, strict=True)
        )
        loaded = self._next_tokens(start, tokens)
        return {
            "kv_bit_equal": same,
            "logits_bit_equal": bool(torch.equal(computed[0], loaded[0])),
            "next_tokens_equal": computed[1] == loaded[1],
            "first_token_as_in_one_pass": int(whole.argmax()) == loaded[1][0],
        }

    def _next_tokens(self, start: int, tokens: int) -> tuple[Any, list[int]]:
        """Logits behind the prompt, and the tokens that a greedy decoder goes on with, from the K
        and V that the cache holds of the first ``start`` tokens."""
        from kvfs_tools.gpu_models import first_token

        logits = self.logits(start, tokens)
        found = [int(logits.argmax())]
        room = self.cache.layers[0].all_keys.shape[2] - tokens
        for _ in range(min(NEXT_TOKENS - 1, room)):
            ids = self.device_ids.new_tensor(found[-1:])
            found.append(int(first_token(self.model, self.cache, ids).argmax()))
        return logits, found


def balanced(names: Sequence[str]) -> list[list[str]]:
    """Orders of ``names``, each of which follows every other one equally often (a Williams
    square, two for an odd number)."""
    count = len(names)
    zigzag = [(n + 1) // 2 if n % 2 else -(n // 2) for n in range(count)]
    rows = [[names[(place + row) % count] for place in zigzag] for row in range(count)]
    return rows + [row[::-1] for row in rows] if count % 2 else rows


def _overlap(taken: dict[str, list[float]]) -> dict[str, float]:
    """How much of the load's time the forward pass hides: each first token against the forward pass
    of the same turn."""
    if "alone" not in taken:
        return {}
    alone = statistics.median(taken["alone"])
    late = [t - rest for t, rest in zip(taken["ttft"], taken["rest"], strict=True)]
    return {
        "load_s": round(alone, 5),
        "compute_rest_s": round(statistics.median(taken["rest"]), 5),
        "exposed_s": round(statistics.median(late), 5),
        "hidden": round(1 - statistics.median(late) / alone, 3),
    }


def nothing() -> None:
    pass


def run_model(
    name: str,
    directory: Path,
    cluster: LocalCluster,
    *,
    device: Device,
    lengths: tuple[int, ...],
    rounds: int,
    shape: dict[str, Any] | None,
    wanted: tuple[str, ...],
    report: Callable[[dict[str, Any]], None],
) -> None:
    """All rows of one model, from the places ``wanted``; ``report`` is called with each."""
    bench = Bench(name, max(lengths), device, shape)
    layout = kvfs.KVLayout(block_tokens=BLOCK_TOKENS, block_bytes=bench.block_bytes)
    arena_bytes = 512 * MIB if bench.on_gpu else 64 * MIB
    with (
        kvfs.connect(cluster.directory) as client,
        small_agent(cluster, directory / "agent.log", arena_bytes) as cold_client,
    ):
        namespace = client.namespace(f"ttft/{name}", layout, create=True)
        filler = Filler(client, cold_client, namespace.name, bench.block_bytes, arena_bytes)
        cold_namespace = cold_client.namespace(f"ttft/{name}")
        with (
            Loader.open(namespace, device) as loader,
            Loader.open(cold_namespace, device) as cold_loader,
        ):
            bench.compute(max(lengths))
            stored = loader.store(bench.keys, bench.pages(len(bench.keys)), after=bench.stream)
            if stored.result() != len(bench.keys):
                raise RuntimeError("not everything was stored")
            places = [
                Place("arena", namespace, loader, nothing),
                Place("disk", cold_namespace, cold_loader, partial(filler.flush, bench.keys)),
            ]
            places = [place for place in places if place.name in wanted]
            bench.teach(places, max(lengths))
            for tokens in lengths:
                recompute = bench.median(rounds, partial(bench.compute, tokens), nothing)
                report(bench.head("compute", tokens, 0.0, recompute, recompute))
                for place in places:
                    for fraction in FRACTIONS:
                        report(bench.row(place, tokens, fraction, recompute, rounds))


class Filler:
    """Blocks that nobody wants: got through an agent, they drive all others out of its arena."""

    def __init__(
        self,
        client: kvfs.Client,
        cold: kvfs.Client,
        wanted: str,
        block_bytes: int,
        arena_bytes: int,
    ) -> None:
        """``wanted``: the namespace whose blocks are to be driven out."""
        size = max(block_bytes, 4 * MIB)
        count = arena_bytes // size + 2
        self._keys = kvfs.block_keys(range(count), 1, salt=b"filler")
        layout = kvfs.KVLayout(block_tokens=1)
        namespace = client.namespace("ttft/filler", layout, create=True)
        data = np.random.default_rng(2).integers(0, 256, size, dtype=np.uint8)
        for key in self._keys:
            namespace.put([key], [data])
        self._namespace = cold.namespace("ttft/filler")
        self._wanted = cold.namespace(wanted)
        self._step = max(1, min(64 * MIB, arena_bytes // 4) // size)

    def flush(self, keys: list[bytes]) -> None:
        """Afterwards none of ``keys`` is in the arena."""
        for _ in range(FLUSHES):
            self._flush()
            if not (left := self._wanted.resident(keys)):
                return
        raise RuntimeError(f"{left} blocks are in the arena still")

    def _flush(self) -> None:
        for start in range(0, len(self._keys), self._step):
            with self._namespace.get(self._keys[start : start + self._step]) as blocks:
                if blocks.hits == 0:
                    raise RuntimeError("the filler is gone")


def show(row: dict[str, Any]) -> None:
    hidden = f" hidden {row['hidden']:5.2f} rule {row['rule']}" if "hidden" in row else ""
    click.echo(
        f"{row['model']:20s} {row['path']:8s} {row['tokens']:6d} {row['stored_fraction']:4.0%}"
        f" {row['ttft_s']:8.4f} s, compute {row['recompute_s']:8.4f} s x{row['speedup']:5.1f}"
        f"{hidden}"
    )


@click.command("bench-ttft")
@click.option("--dir", "directory", help="Where the cluster lives.")
@click.option("--model", "models", multiple=True, help="Some of the models alone.")
@click.option("--tokens", "lengths", multiple=True, type=int, default=(2048, 8192, 32768))
@click.option("--place", "places", multiple=True, type=click.Choice(PLACES), help="One alone.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--device", default="cuda", show_default=True, help="cuda, or cpu to try it out.")
@click.option("--arena-mib", type=click.IntRange(64), default=8192, show_default=True)
@click.option("--json", "json_path", help="Write the rows here too, after each.")
@click.option("--plot", "plot_path", help="Draw them into this file (needs matplotlib).")
@click.option("--commit", default="", help="Recorded in the file: what was measured.")
@click.option("--tiny", is_flag=True, help="Two layers of a few heads: to try it out.")
def bench_ttft(
    *,
    directory: str | None,
    models: tuple[str, ...],
    lengths: tuple[int, ...],
    places: tuple[str, ...],
    rounds: int,
    device: str,
    arena_mib: int,
    json_path: str | None,
    plot_path: str | None,
    commit: str,
    tiny: bool,
) -> None:
    """Measure the time to the first token with stored prefixes (needs torch and transformers)."""
    from kvfs_tools.gpu_models import SHAPES

    opened = open_device(device)
    folder = Path(tempfile.mkdtemp(prefix="kvfs-ttft-", dir=directory))
    found: dict[str, Any] = {
        "commit": commit,
        "device": device_name() if opened.name != "cpu" else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "rounds": rounds,
        "block_tokens": BLOCK_TOKENS,
        "rows": [],
    }

    def report(row: dict[str, Any]) -> None:
        found["rows"].append(row)
        show(row)
        if json_path:
            write(Path(json_path), found)

    try:
        with LocalCluster(folder, arena_bytes=arena_mib * MIB, mount=False) as cluster:
            for name in models or SHAPES:
                shape = TINY[SHAPES[name][0]] if tiny else None
                run_model(
                    name,
                    folder,
                    cluster,
                    device=opened,
                    lengths=lengths,
                    rounds=rounds,
                    shape=shape,
                    wanted=places or PLACES,
                    report=report,
                )
                free_memory()
        if plot_path:
            gpu_plot.first_token(Path(plot_path), found["rows"])
        wrong = [row for row in found["rows"] if not row.get("kv_bit_equal", True)]
        if wrong:
            raise click.ClickException(f"{len(wrong)} rows: what was loaded is not what was stored")
    finally:
        free_memory()
        shutil.rmtree(folder, ignore_errors=True)


def free_memory() -> None:
    """Gives the memory of a model that is no more back to the device."""
    import torch

    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
TINY: dict[str, dict[str, Any]] = {
    "Llama": {**_TINY, "num_key_value_heads": 2},
    "DeepseekV3": {
        **_TINY,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
}


if __name__ == "__main__":
    bench_ttft()
