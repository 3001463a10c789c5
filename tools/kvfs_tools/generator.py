"""Requests of multi-turn conversations that share system prompts, made from a seed.

The defaults were fitted to the public hour of a production chat service that Mooncake released
(12,031 requests); ``comparison`` prints the two side by side. How a trace comes about:

- Every input starts with the service's own system prompt. Some openings also carry a longer shared
  prompt (an assistant's instructions, a common document), popular ones more often.
- A conversation opens with a text of log-normal length; some openings are one-liners that nobody
  follows up.
- After each turn the user goes on with a probability that grows with the turns so far, after a
  log-normal pause. Pauses are shares of the length of the trace: reuse distances, counted in
  requests, then stretch with the trace, so that a short trace has the statistics of the whole hour.
- A follow-up appends the answer and a question, sometimes a document. Sometimes the user edits an
  earlier turn instead: what followed is dropped and written anew.

Blocks have 512 tokens. A partial last block gets an id of its own at each turn, since its tokens
differ once the text goes on.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
from collections.abc import Sequence

import click

from kvfs_base.errors import InvalidRequest
from kvfs_tools.traces import (
    TRACE_BLOCK_TOKENS,
    TraceRequest,
    TraceStatistics,
    read_trace,
    trace_statistics,
    write_trace,
)

REQUESTS_MAX = 10_000_000
INPUT_TOKENS_MAX = 128 * 1024


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """What a trace is made of. Times are in shares of the trace's length unless a unit is named."""

    requests: int = 12_000
    seed: int = 1
    requests_per_second: float = 3.4
    opening_share: float = 0.63
    """Conversations that open, for each request of the trace."""
    system_prompt_tokens: int = 880
    """The prompt that every input starts with: one full block and a part of the second."""
    shared_prompts: int = 48
    shared_prompt_share: float = 0.052
    """Openings that carry one of the shared prompts."""
    shared_prompt_tokens: tuple[float, float] = (9_000, 0.4)
    """Median and sigma of a log-normal, as everywhere below."""
    shared_prompt_zipf: float = 0.6
    """The k-th most popular prompt is used in proportion to 1 / k ** this."""
    one_liner_share: float = 0.29
    one_liner_tokens: tuple[float, float] = (25, 0.6)
    opening_tokens: tuple[float, float] = (6_350, 1.17)
    continuation: tuple[float, ...] = (0.40, 0.435, 0.54, 0.61, 0.63, 0.66, 0.685)
    """Probability of another turn after turn 1, 2, ...; the last value holds from there on. Turns
    that would fall behind the end of the trace are not in it."""
    pause: tuple[float, float] = (0.049, 1.13)
    answer_tokens: tuple[float, float] = (330, 0.8)
    question_tokens: tuple[float, float] = (140, 1.04)
    document_share: float = 0.22
    document_tokens: tuple[float, float] = (5_300, 0.99)
    edit_share: float = 0.21
    """Follow-ups that go back behind an earlier turn and take another way from there."""
    edit_depth: float = 3.0
    """Of what the user wrote so far, ``u ** edit_depth`` is kept, u uniform in 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 < self.requests <= REQUESTS_MAX:
            raise InvalidRequest(detail=f"requests must be 1 to {REQUESTS_MAX}")
        if self.requests_per_second <= 0:
            raise InvalidRequest(detail="requests_per_second must be positive")
        shares = (
            self.shared_prompt_share,
            self.one_liner_share,
            self.opening_share,
            self.document_share,
            self.edit_share,
            *self.continuation,
        )
        if not self.continuation or not all(0 <= s <= 1 for s in shares):
            raise InvalidRequest(detail="shares and probabilities must be 0 to 1")
        if self.opening_share == 0:
            raise InvalidRequest(detail="opening_share must be positive")
        if self.continuation[-1] == 1:
            raise InvalidRequest(detail="conversations would never end")


REFERENCE = TraceStatistics(
    requests=12_031,
    references=288_500,
    distinct=182_790,
    hit_rate=0.3664,
    blocks_per_request={10: 2, 25: 5, 50: 14, 75: 31, 90: 54, 99: 167},
    mean_blocks=23.98,
    first_block_only=0.6128,
    reuse_distance={10: 0.0003, 25: 0.0235, 50: 0.0457, 75: 0.0976, 90: 0.1728, 99: 0.4665},
    lru_hit_rates={0.01: 0.0523, 0.05: 0.1954, 0.10: 0.2784, 0.20: 0.3446},
)
"""Figures of Mooncake's conversation trace."""


class _Text:
    """The input of one conversation: tokens, and an id for each full block of them."""

    def __init__(self, ids: Sequence[int], tokens: int) -> None:
        self.blocks = list(ids)
        self.tokens = tokens

    def append(self, tokens: int, new_id: itertools.count[int]) -> None:
        self.tokens = min(self.tokens + tokens, INPUT_TOKENS_MAX)
        while len(self.blocks) < self.tokens // TRACE_BLOCK_TOKENS:
            self.blocks.append(next(new_id))

    def cut(self, tokens: int) -> None:
        self.tokens = tokens
        del self.blocks[tokens // TRACE_BLOCK_TOKENS :]


@dataclasses.dataclass
class _Conversation:
    text: _Text
    answer_tokens: int
    kept_tokens: int
    """The prompts it opened with: an edit never goes behind them."""
    turn: int = 1
    ends: bool = False


class _Generator:
    def __init__(self, config: GeneratorConfig) -> None:
        self.config = config
        self.rng = random.Random(config.seed)
        self.new_id = itertools.count()
        self.system = _Text([], 0)
        self.system.append(config.system_prompt_tokens, self.new_id)
        self.prompts = [self._prompt() for _ in range(config.shared_prompts)]
        self.weights = [1 / k**config.shared_prompt_zipf for k in range(1, len(self.prompts) + 1)]

    def _lengths(self, median_sigma: tuple[float, float]) -> int:
        median, sigma = median_sigma
        return max(1, round(self.rng.lognormvariate(math.log(median), sigma)))

    def _prompt(self) -> _Text:
        prompt = _Text(self.system.blocks, self.system.tokens)
        prompt.append(self._lengths(self.config.shared_prompt_tokens), self.new_id)
        return prompt

    def open(self) -> _Conversation:
        rng, config = self.rng, self.config
        start = self.system
        if self.prompts and rng.random() < config.shared_prompt_share:
            start = rng.choices(self.prompts, self.weights)[0]
        ends = rng.random() < config.one_liner_share
        text = _Text(start.blocks, start.tokens)
        text.append(
            self._lengths(config.one_liner_tokens if ends else config.opening_tokens), self.new_id
        )
        return _Conversation(text, self._answer(), start.tokens, ends=ends)

    def _answer(self) -> int:
        return min(2000, self._lengths(self.config.answer_tokens))

    def follow_up(self, talk: _Conversation) -> None:
        rng, config = self.rng, self.config
        talk.turn += 1
        grown = talk.answer_tokens + self._lengths(config.question_tokens)
        if rng.random() < config.edit_share:
            span = talk.text.tokens - talk.kept_tokens
            kept = talk.kept_tokens + round(span * rng.random() ** config.edit_depth)
            grown += round((talk.text.tokens - kept) * rng.random() * 2)
            talk.text.cut(kept)
        elif rng.random() < config.document_share:
            grown += self._lengths(config.document_tokens)
        talk.text.append(grown, self.new_id)
        talk.answer_tokens = self._answer()

    def goes_on(self, talk: _Conversation) -> bool:
        if talk.ends or talk.text.tokens >= INPUT_TOKENS_MAX:
            return False
        odds = self.config.continuation
        return self.rng.random() < odds[min(talk.turn, len(odds)) - 1]

    def request(self, moment: float, talk: _Conversation) -> TraceRequest:
        ids = talk.text.blocks
        if talk.text.tokens % TRACE_BLOCK_TOKENS:
            ids = [*ids, next(self.new_id)]
        milliseconds = moment * self.config.requests / self.config.requests_per_second * 1000
        return TraceRequest(round(milliseconds), talk.text.tokens, talk.answer_tokens, tuple(ids))


def generate(config: GeneratorConfig | None = None) -> list[TraceRequest]:
    """A trace of ``config.requests`` requests in order of time; equal configurations give equal
    traces. About 1 s for 12,000 requests."""
    config = config or GeneratorConfig()
    maker = _Generator(config)
    openings_a_trace = config.requests * config.opening_share
    opening = 0.0
    order = itertools.count()
    waiting: list[tuple[float, int, _Conversation]] = []
    trace: list[TraceRequest] = []
    while len(trace) < config.requests:
        while not waiting or opening < waiting[0][0]:
            heapq.heappush(waiting, (opening, next(order), maker.open()))
            opening += maker.rng.expovariate(openings_a_trace)
        moment, _, talk = heapq.heappop(waiting)
        trace.append(maker.request(moment, talk))
        if maker.goes_on(talk):
            later = moment + maker.rng.lognormvariate(math.log(config.pause[0]), config.pause[1])
            maker.follow_up(talk)
            heapq.heappush(waiting, (later, next(order), talk))
    return trace


def comparison(found: TraceStatistics, reference: TraceStatistics = REFERENCE) -> list[list[str]]:
    """Rows of (figure, of this trace, of the reference trace) for a table."""
    rows = [
        ["requests", f"{found.requests:,}", f"{reference.requests:,}"],
        ["block references", f"{found.references:,}", f"{reference.references:,}"],
        ["distinct blocks", f"{found.distinct:,}", f"{reference.distinct:,}"],
        ["hit rate, unbounded", f"{found.hit_rate:.1%}", f"{reference.hit_rate:.1%}"],
        [
            "requests that hit at most one block",
            f"{found.first_block_only:.1%}",
            f"{reference.first_block_only:.1%}",
        ],
        ["blocks a request, mean", f"{found.mean_blocks:.1f}", f"{reference.mean_blocks:.1f}"],
    ]
    for p, blocks in found.blocks_per_request.items():
        rows.append([f"blocks a request, p{p}", str(blocks), str(reference.blocks_per_request[p])])
    for share, rate in found.lru_hit_rates.items():
        there = reference.lru_hit_rates[share]
        rows.append([f"hit rate, LRU of {share:.0%} of the blocks", f"{rate:.1%}", f"{there:.1%}"])
    for p, distance in found.reuse_distance.items():
        there = reference.reuse_distance[p]
        rows.append([f"reuse distance, p{p} (of the blocks)", f"{distance:.2%}", f"{there:.2%}"])
    return rows


@click.group()
def trace() -> None:
    """Traces of requests: what they say about reuse, and made-up ones."""


@trace.command()
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--requests", type=click.IntRange(1, REQUESTS_MAX), help="At most so many.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the generator.")
def show(file: str | None, requests: int | None, seed: int) -> None:
    """Compare a trace (or, without FILE, a generated one) with the reference trace."""
    if file is not None:
        found = list(read_trace(file, requests))
    else:
        found = generate(GeneratorConfig(requests=requests or 12_000, seed=seed))
    rows = [["", "this trace", "reference"], *comparison(trace_statistics(found))]
    width = max(len(row[0]) for row in rows)
    for name, here, there in rows:
        click.echo(f"{name:<{width}}  {here:>11}  {there:>11}")


@trace.command(name="generate")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--requests", type=click.IntRange(1, REQUESTS_MAX), default=12_000, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
def generate_command(file: str, requests: int, seed: int) -> None:
    """Write a generated trace to FILE."""
    count = write_trace(file, generate(GeneratorConfig(requests=requests, seed=seed)))
    click.echo(f"{count:,} requests in {file}")
