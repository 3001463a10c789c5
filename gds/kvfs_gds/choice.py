"""Load a stored prefix, or compute it again? Whichever is expected to be over sooner.

A disk can be slower than a GPU: users of file caches see hits that cost more than misses. What both
ways take is learned from what they took before:

    compute(n tokens behind a context of c)  =  a + b n + d n (c + n / 2)      attention is the last
                                            or  max(a, b n + d n (c + n / 2))
    load(bytes from the arena, from disk)    =  between those of such sizes    for each of the two

The second form is that of models whose kernels are queued more slowly than short prompts compute:
then half a prompt takes as long as all of it. Whichever is closer to what was seen counts.

From the arena, layer after layer is copied while earlier ones compute; from disk, the last layer is
there as soon as the first one. So for ``n`` tokens of which ``c`` are stored:

    load from the arena  =  first layer + max(the other layers, compute(n - c, c))
    load from disk       =  load + compute(n - c, c)

Machines drift: what prompts of about that length took lately, against what the form above gives for
them, scales both of its uses. What neither sees (keys, look-ups, threads that take turns with the
one that queues the model) is learned from first tokens that came after a load: how much later they
came than was expected, for prompts of about that length.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import math
import threading

import numpy as np

KEPT_OBSERVATIONS = 128
"""Of each kind; older ones are forgotten: clocks, neighbours and batch sizes change."""


SIZE_FACTOR = 1.15
"""Loads whose sizes differ by less are alike."""

MARGIN = 0.03
"""A load that is expected to save less than this is not worth it: estimates are not better, and it
takes the link and the agent from others."""

LAST_ONES = 5
"""Of those that are alike, the last ones count: disks have hours, and neighbours."""

LATELY_FACTOR = 2
"""How fast the machine is lately, prompts up to twice as long or short say."""

LATE_FACTOR = 4
"""How late a first token comes says something of prompts up to four times as long or short."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds until the first token."""

    load: float
    compute: float

    @property
    def load_is_faster(self) -> bool:
        return self.load < (1 - MARGIN) * self.compute


class LoadOrCompute:
    """The rule for one model on one device. Thread-safe. Without observations it loads: the first
    loads and prefills teach it."""

    def __init__(self, layers: int) -> None:
        self._layers = max(1, layers)
        self._lock = threading.Lock()
        self._computed: collections.deque[tuple[int, int, float]]
        self._computed = collections.deque(maxlen=KEPT_OBSERVATIONS)
        self._loaded: dict[bool, collections.deque[tuple[int, float]]] = {
            disk: collections.deque(maxlen=KEPT_OBSERVATIONS) for disk in (False, True)
        }
        self._loads_seen: collections.deque[tuple[tuple[int, int, int, int], float]]
        self._loads_seen = collections.deque(maxlen=KEPT_OBSERVATIONS)
        """What ``estimate`` was, or could have been, asked, and how long it took."""
        self._fit: _Compute | None = None
        """Of ``_computed``, until there is more of it."""

    def observe_compute(self, tokens: int, context: int, seconds: float) -> None:
        """A prefill of ``tokens`` behind ``context`` tokens of KV took this long."""
        with self._lock:
            self._computed.append((tokens, context, seconds))
            self._fit = None

    def observe_load(self, nbytes: int, seconds: float, *, from_disk: bool) -> None:
        """A load, of the arena or of the disk alone, took this long by itself."""
        with self._lock:
            self._loaded[from_disk].append((nbytes, seconds))

    def observe_first_token(
        self, tokens: int, stored_tokens: int, arena_bytes: int, disk_bytes: int, seconds: float
    ) -> None:
        """A first token came this long after its prompt, with a load as ``estimate`` describes."""
        with self._lock:
            self._loads_seen.append(((tokens, stored_tokens, arena_bytes, disk_bytes), seconds))

    def estimate(
        self, tokens: int, stored_tokens: int, arena_bytes: int, disk_bytes: int
    ) -> Estimate | None:
        """For a prompt of ``tokens`` of which the first ``stored_tokens`` could be loaded, from the
        arena and from disk. None as long as nothing is known of what it needs."""
        known = self._known()
        found = known.expect(tokens, stored_tokens, arena_bytes, disk_bytes)
        if found is None:
            return None
        with self._lock:
            seen = list(self._loads_seen)
        near = [one for one in seen if _alike(one[0][0], tokens, LATE_FACTOR)] or seen
        late = [
            seconds - expected.load
            for prompt, seconds in near[-LAST_ONES:]
            if (expected := known.expect(*prompt)) is not None
        ]
        return Estimate(found.load + max(0.0, float(np.median(late or [0.0]))), found.compute)

    def _known(self) -> _Known:
        with self._lock:
            if self._fit is None and self._computed:
                self._fit = _fit_compute(list(self._computed))
            loaded = {disk: list(taken) for disk, taken in self._loaded.items()}
            return _Known(self._layers, self._fit, list(self._computed), loaded)

    def should_load(
        self, tokens: int, stored_tokens: int, arena_bytes: int, disk_bytes: int
    ) -> bool:
        """Whether the stored prefix is worth loading. Arguments as for ``estimate``."""
        if not stored_tokens:
            return False
        found = self.estimate(tokens, stored_tokens, arena_bytes, disk_bytes)
        return found is None or found.load_is_faster


@dataclasses.dataclass(frozen=True)
class _Known:
    """What was observed so far."""

    layers: int
    model: _Compute | None
    computed: list[tuple[int, int, float]]
    loaded: dict[bool, list[tuple[int, float]]]

    def expect(
        self, tokens: int, stored_tokens: int, arena_bytes: int, disk_bytes: int
    ) -> Estimate | None:
        """As ``LoadOrCompute.estimate``, of transfers and arithmetic alone."""
        model = self.model
        needed = [disk for disk, size in ((False, arena_bytes), (True, disk_bytes)) if size]
        if model is None or any(not self.loaded[disk] for disk in needed):
            return None
        pace = self._pace(model, tokens)
        rest = pace * model.seconds(max(1, tokens - stored_tokens), stored_tokens)
        whole = pace * model.seconds(tokens, 0)
        arena = _line(self.loaded[False], arena_bytes) if arena_bytes else 0.0
        if disk_bytes:
            return Estimate(arena + _line(self.loaded[True], disk_bytes) + rest, whole)
        first = arena / self.layers
        return Estimate(first + max(arena - first, rest), whole)

    def _pace(self, model: _Compute, tokens: int) -> float:
        """What the last prefills of about ``tokens`` took, as parts of what the model says."""
        found: list[float] = []
        for count, context, seconds in reversed(self.computed):
            if _alike(count, tokens, LATELY_FACTOR):
                found.append(seconds / model.seconds(count, context))
                if len(found) == LAST_ONES:
                    break
        return float(np.median(found or [1.0]))


@dataclasses.dataclass(frozen=True)
class _Compute:
    """What a prefill takes: the coefficients a, b and d, and whether a is a floor or a summand."""

    a: float
    b: float
    d: float
    floor: bool
    longest: int = 0
    longest_s: float = 0.0
    """Tokens and seconds of the longest prefill that was seen. A longer one takes its share more at
    least: all that were seen may have been as short as the floor."""

    def seconds(self, tokens: int, context: int) -> float:
        work = self.b * tokens + self.d * tokens * (context + tokens / 2)
        found = max(self.a, work) if self.floor else self.a + work
        if tokens <= self.longest or not self.longest:
            return found
        return max(found, self.longest_s * tokens / self.longest)

    def error(self, taken: list[tuple[int, int, float]]) -> float:
        """The sum of the squared relative errors."""
        return sum((self.seconds(n, c) / s - 1) ** 2 for n, c, s in taken)


def _fit_compute(taken: list[tuple[int, int, float]]) -> _Compute:
    fits = [_Compute(*_least_squares(taken, (1, 0, 2)), floor=False)]
    ordered = sorted(s for _, _, s in taken)
    # Where the floor ends is tried out: at the smallest time, at a quarter of them, at a half.
    for share in (0, 4, 2):
        floor = float(np.median(ordered[: max(1, len(ordered) // share if share else 1)]))
        above = [row for row in taken if row[2] > 1.2 * floor]
        if above:
            _, b, d = _least_squares(above, (1, 2))
            fits.append(_Compute(floor, b, d, floor=True))
    best = min(fits, key=lambda fit: fit.error(taken))
    longest = max(n for n, _, _ in taken)
    seconds = float(np.median([s for n, _, s in taken if n == longest]))
    return dataclasses.replace(best, longest=longest, longest_s=seconds)


def _least_squares(
    taken: list[tuple[int, int, float]], columns: tuple[int, ...]
) -> tuple[float, float, float]:
    """Coefficients (a, b, d), none below zero: least squares of the relative error, without the
    terms that are not among ``columns`` or would come out negative."""
    rows = np.array([(1.0, n, n * (c + n / 2)) for n, c, _ in taken])
    seconds = np.array([s for _, _, s in taken])
    scaled, ones = rows / seconds[:, None], np.ones(len(taken))
    used = list(columns) if len({n for n, _, _ in taken}) >= len(columns) else [1]
    found = np.zeros(3)
    while used:
        norms = np.linalg.norm(scaled[:, used], axis=0)
        some = np.linalg.lstsq(scaled[:, used] / norms, ones, rcond=None)[0] / norms
        if (some >= 0).all():
            found[used] = some
            break
        used = [column for column, value in zip(used, some, strict=True) if value >= 0]
    a, b, d = found.tolist()
    return a, b, d


def _alike(tokens: int, others: int, factor: int) -> bool:
    return tokens <= factor * others and others <= factor * tokens


def _line(taken: list[tuple[int, float]], nbytes: int) -> float:
    """Seconds for ``nbytes``: on the straight line between the medians of loads that were a bit
    shorter and a bit longer. One line through all would not do: the first bytes of a disk often
    come from a cache, or on credit."""
    points = _medians(taken)
    if len(points) == 1:
        size, seconds = points[0]
        return seconds * nbytes / size
    place = min(max(1, bisect.bisect_left(points, (nbytes, 0.0))), len(points) - 1)
    (low, low_s), (high, high_s) = points[place - 1 : place + 1]
    rate = (high_s - low_s) / (high - low)
    if nbytes > high:
        return high_s + max(rate, 0.0) * (nbytes - high)
    if nbytes < low:
        return max(low_s - max(rate, 0.0) * (low - nbytes), low_s * nbytes / low)
    return low_s + rate * (nbytes - low)


def _medians(taken: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """(bytes, seconds), by size, of the last loads of about that size."""
    alike: dict[int, list[tuple[int, float]]] = {}
    for nbytes, seconds in taken:
        size = max(nbytes, 1)
        alike.setdefault(round(math.log(size, SIZE_FACTOR)), []).append((size, seconds))
    found = [np.median(np.array(some[-LAST_ONES:]), axis=0).tolist() for some in alike.values()]
    return sorted((size, seconds) for size, seconds in found)


__all__ = ["Estimate", "LoadOrCompute"]
