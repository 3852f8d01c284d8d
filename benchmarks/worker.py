"""One framework's part of a case, in a process of its own.

The answer goes to a file, because frameworks print; their output is shown only when the process fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pydantic import BaseModel

from benchmarks import machine
from benchmarks.cases import case, series_of
from benchmarks.harness import BenchmarkError, measure
from benchmarks.memory import peak_extra
from benchmarks.records import Row, SeriesRecord
from slimbridge.errors import SlimbridgeError, listed


class _Memory(BaseModel):
    bytes: int | None


def time_series(name: str, framework: str, repeats: int) -> SeriesRecord:
    """Check and time all competitors of a series here; errors as in `measure`."""
    before = machine.load_average()
    series = series_of(name, framework)
    warmup = case(name).warmup
    timings = measure(series.competitors, repeats, warmup)
    rows = [
        Row(name=item.name, note=item.note, seconds=timings[item.name].seconds, facts=dict(timings[item.name].facts))
        for item in series.competitors
    ]
    return SeriesRecord(
        rows=tuple(rows),
        warmup=warmup,
        threads=series.threads,
        settings=machine.thread_settings(),
        versions=machine.versions(series.distributions),
        load_before=before,
        load_after=machine.load_average(),
        weights_bytes=series.weights_bytes,
        ratio=series.ratio,
        faster=series.faster,
    )


def memory_of(name: str, framework: str, competitor: str) -> int | None:
    """Peak extra bytes of one competitor's run, measured here."""
    series = series_of(name, framework)
    found = [item for item in series.competitors if item.name == competitor]
    if not found:
        known = listed(item.name for item in series.competitors)
        raise BenchmarkError(f"case '{name}', {framework}: no competitor '{competitor}'; it has: {known}")
    found[0].attempt()
    peaks = [peak_extra(found[0].run, found[0].prepare()) for _ in range(case(name).memory_runs)]
    return max((peak for peak in peaks if peak is not None), default=None)


def run_series(name: str, framework: str, repeats: int, threads: int) -> SeriesRecord:
    """A whole series: one process that times, then one for each competitor's memory, where the case measures it.

    Args:
        name: of the case.
        framework: one that the case has a series for.
        repeats: timed runs of each competitor.
        threads: that one operation may use, through the variables of OpenMP and MKL.

    Raises:
        BenchmarkError: a process failed; the error ends with the last lines that it wrote.
    """
    timed = SeriesRecord.model_validate_json(_process(threads, name, framework, "--repeats", str(repeats)))
    if not case(name).memory_runs:
        return timed
    rows = []
    for row in timed.rows:
        answer = _Memory.model_validate_json(_process(threads, name, framework, "--memory", row.name))
        rows.append(row.model_copy(update={"peak_extra_bytes": answer.bytes}))
    return timed.model_copy(update={"rows": tuple(rows)})


def _process(threads: int, name: str, framework: str, *arguments: str) -> bytes:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.worker", name, framework, str(answer), *arguments]
        done = subprocess.run(command, cwd=machine.ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0 or not answer.is_file():
            tail = "\n".join(done.stderr.strip().splitlines()[-3:])
            raise BenchmarkError(f"case '{name}', {framework}: the process ended with {done.returncode}\n{tail}")
        return answer.read_bytes()


def main() -> int:
    """The process: 0 and a file, or 1 and a line on stderr."""
    parser = argparse.ArgumentParser(prog="benchmarks.worker")
    parser.add_argument("case")
    parser.add_argument("framework")
    parser.add_argument("answer", type=Path)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--memory", metavar="COMPETITOR")
    options = parser.parse_args()
    answer: BaseModel
    try:
        if options.memory is None:
            answer = time_series(options.case, options.framework, options.repeats)
        else:
            answer = _Memory(bytes=memory_of(options.case, options.framework, options.memory))
    except SlimbridgeError as error:
        print(error, file=sys.stderr)
        return 1
    options.answer.write_text(answer.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
