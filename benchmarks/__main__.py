"""`python -m benchmarks [--case NAME] [--repeats N] [--threads N]`: run cases, write RESULTS.md and results.json."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import machine
from benchmarks.cases import case, cases
from benchmarks.harness import REPEATS, BenchmarkError, Case, require
from benchmarks.records import CaseRecord, Environment, read_results
from benchmarks.table import markdown
from benchmarks.worker import run_series

THREADS = 1  # with more, a busy core makes every parallel loop wait for it, and times vary tenfold


def environment() -> Environment:
    """This machine and this checkout, now."""
    return Environment(
        processor=machine.processor(),
        cores=machine.cores(),
        memory_gib=machine.memory_gib(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        commit=machine.commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def run_case(item: Case, repeats: int, threads: int) -> CaseRecord:
    """All series of a case, one framework after the other; errors as in `run_series`."""
    found = environment()
    series = {framework: run_series(item.name, framework, repeats, threads) for framework in item.series}
    return CaseRecord(title=item.title, environment=found, series=series)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named cases, or all; a case that is not run keeps its earlier results."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument(
        "--case", action="append", metavar="NAME", help=f"one of: {', '.join(cases())}; may be given again"
    )
    parser.add_argument("--repeats", type=int, metavar="N", help=f"timed runs (default: the case's, mostly {REPEATS})")
    parser.add_argument(
        "--threads", type=int, default=THREADS, metavar="N", help="of an operation (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, metavar="FOLDER", help="of the results")
    options = parser.parse_args(arguments)
    data = options.output / "results.json"
    try:
        for word in ("repeats", "threads"):
            found = getattr(options, word)
            require(found is None or found >= 1, f"--{word} must be at least 1, found {found}")
        require(options.output.is_dir(), f"--output: '{options.output}' is not a folder")
        chosen = [case(name) for name in options.case or cases()]
        results = read_results(data)
        for item in chosen:
            repeats = options.repeats or item.repeats
            print(f"{item.name}: {repeats} repetitions ...", flush=True)
            results = results.with_case(item.name, run_case(item, repeats, options.threads))
            data.write_text(results.model_dump_json(indent=1) + "\n")
            (options.output / "RESULTS.md").write_text(markdown(results))
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"written: {options.output / 'RESULTS.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
