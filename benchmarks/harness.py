"""What a case is, and how its competitors are timed: results are asserted first, repetitions are interleaved."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimbridge.errors import SlimbridgeError

REPEATS = 9
RATIO_TO_OURS = "ratio to ours"


class BenchmarkError(SlimbridgeError):
    """A case cannot run, or a competitor's result is wrong."""


@dataclass(frozen=True)
class Competitor:
    """One way to do the job.

    Attributes:
        name: how the table calls it.
        prepare: makes what `run` takes, afresh for each run; not timed.
        run: the job; timed.
        check: raises BenchmarkError when a result of `run` is wrong; returns integers for the table, by column.
        note: what a reader must know to judge the row.
        trial: makes what the checked and the warm-up runs take, where that of `prepare` would take too long.
    """

    name: str
    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    check: Callable[[Any], Mapping[str, int]]
    note: str = ""
    trial: Callable[[], Any] | None = None

    def attempt(self) -> Any:
        """The result of a run that is not timed."""
        return self.run((self.trial or self.prepare)())


@dataclass(frozen=True)
class Series:
    """Competitors of one framework, timed in one process; the first is the one the others are compared with.

    Attributes:
        competitors: in the order of each round.
        distributions: installed distributions whose versions matter.
        threads: threads that one operation may use.
        weights_bytes: memory of the whole model's arrays.
        ratio: how the table calls the row's median over the first row's.
        faster: the ratio is the first row's median over the row's.
    """

    competitors: tuple[Competitor, ...]
    distributions: tuple[str, ...]
    threads: int
    weights_bytes: int
    ratio: str = RATIO_TO_OURS
    faster: bool = False


@dataclass(frozen=True)
class Case:
    """A comparison.

    Attributes:
        name: what `--case` takes.
        title: what is measured, one sentence.
        series: framework -> builder of its series; called in a process of its own, which may import the framework.
        repeats: timed runs of each competitor, where nobody asks for another number.
        warmup: untimed runs of each after the checked one.
        memory_runs: runs over which a competitor's peak memory is measured; 0 where it says nothing.
    """

    name: str
    title: str
    series: Mapping[str, Callable[[], Series]] = field(default_factory=dict)
    repeats: int = REPEATS
    warmup: int = 1
    memory_runs: int = 2


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed run, in order, and what the check said of the result."""

    seconds: tuple[float, ...]
    facts: Mapping[str, int]


def measure(
    competitors: Sequence[Competitor],
    repeats: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Check every competitor, then time them in rounds A B A B ...

    Args:
        competitors: at least one.
        repeats: timed runs of each, at least 1.
        warmup: untimed runs of each after the checked one.
        clock: seconds, rising.

    Returns:
        competitor's name -> its timing.

    Raises:
        BenchmarkError: a check failed; nothing has been timed then.
    """
    if repeats < 1 or warmup < 0:
        raise BenchmarkError(f"repeats must be at least 1 and warmup at least 0, found {repeats} and {warmup}")
    facts = {item.name: dict(item.check(item.attempt())) for item in competitors}
    for _ in range(warmup):
        for item in competitors:
            item.attempt()
    seconds: dict[str, list[float]] = {item.name: [] for item in competitors}
    for _ in range(repeats):
        for item in competitors:
            seconds[item.name].append(_timed(item, clock))
    return {name: Timing(tuple(runs), facts[name]) for name, runs in seconds.items()}


def _timed(item: Competitor, clock: Callable[[], float]) -> float:
    prepared = item.prepare()
    gc.collect()  # the garbage of the run before belongs to nobody
    started = clock()
    result = item.run(prepared)
    elapsed = clock() - started
    del result  # freed after the clock was read
    return elapsed


def summary(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range (linear interpolation between ranks), in milliseconds."""
    low, median, high = np.percentile(np.asarray(seconds) * 1000, [25, 50, 75])
    return float(median), float(high - low)


def require(condition: bool, message: str) -> None:
    """Raise BenchmarkError with the message unless the condition holds."""
    if not condition:
        raise BenchmarkError(message)
