"""What a run leaves behind: results.json holds these records, RESULTS.md is made from them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.harness import RATIO_TO_OURS, BenchmarkError


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Record):
    """One competitor.

    Attributes:
        name, note: as the case gives them.
        seconds: of each timed run, in order.
        facts: column -> integer, from the check.
        peak_extra_bytes: None where it could not be measured.
    """

    name: str
    note: str
    seconds: tuple[float, ...]
    facts: dict[str, int]
    peak_extra_bytes: int | None = None


class SeriesRecord(_Record):
    """The competitors of one framework, timed in one process.

    Attributes:
        rows: the first is the one that ratios refer to.
        warmup: untimed runs of each after the checked one.
        threads: threads that one operation may use.
        settings: environment variables that were set and matter.
        versions: distribution -> version.
        load_before, load_after: load average of the last minute.
        weights_bytes: memory of the whole model's arrays; None in a record from before it was noted.
        ratio, faster: what the ratio to the first row is called, and which way it goes; as the series gives them.
    """

    rows: tuple[Row, ...]
    warmup: int
    threads: int
    settings: dict[str, str]
    versions: dict[str, str]
    load_before: float
    load_after: float
    weights_bytes: int | None = None
    ratio: str = RATIO_TO_OURS
    faster: bool = False


class Environment(_Record):
    """The machine and the code: processor, cores, memory in GiB, system, Python, commit, date (UTC, ISO 8601)."""

    processor: str
    cores: int
    memory_gib: float
    system: str
    python: str
    commit: str
    date: str


class CaseRecord(_Record):
    """One case: framework -> series."""

    title: str
    environment: Environment
    series: dict[str, SeriesRecord]


class Results(_Record):
    """All cases by name."""

    cases: dict[str, CaseRecord] = {}

    def with_case(self, name: str, record: CaseRecord) -> Results:
        """A copy in which the case is new or replaced."""
        return Results(cases={**self.cases, name: record})


def read_results(path: Path) -> Results:
    """The results of earlier runs, none when there is no file; BenchmarkError for a file that is something else."""
    if not path.exists():
        return Results()
    try:
        return Results.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BenchmarkError(f"{path}: not a results file: {place}: {first['msg']}; remove it to start anew") from error
