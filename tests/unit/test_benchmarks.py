from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as program
from benchmarks import machine, worker
from benchmarks.cases import case, cases, series_of
from benchmarks.harness import REPEATS, BenchmarkError, Competitor, measure, require, summary
from benchmarks.memory import peak_extra
from benchmarks.records import Results, Row, SeriesRecord, read_results
from benchmarks.series import FPGM
from benchmarks.setting import Setting
from benchmarks.table import markdown, table
from benchmarks.toolkits import TorchPruning


class Clock:
    """A clock that only the jobs move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def competitor(self, name: str, seconds: float, valid: bool = True) -> Competitor:
        def prepare() -> str:
            self.now += 100.0
            return name

        def run(prepared: str) -> str:
            self.log.append(prepared)
            self.now += seconds
            return prepared.upper()

        def check(result: str) -> dict[str, int]:
            self.log.append(f"check {result}")
            require(valid, f"{name}: wrong result")
            return {"size": len(result)}

        return Competitor(name, prepare, run, check)


def series() -> SeriesRecord:
    return SeriesRecord(
        rows=(
            Row(name="slimbridge", note="ours", seconds=(0.1, 0.2, 0.3, 0.4), facts={"MACs after": 1234567}),
            Row(name="Other", note="theirs", seconds=(0.5,) * 4, facts={"MACs after": 9}, peak_extra_bytes=205_400_000),
        ),
        warmup=1,
        threads=2,
        settings={"OMP_NUM_THREADS": "2"},
        versions={"numpy": "1.26.4"},
        load_before=0.24,
        load_after=1.26,
        weights_bytes=100_000_000,
    )


def test_results_are_checked_first_and_repetitions_take_turns() -> None:
    clock = Clock()
    measure([clock.competitor("a", 1.0), clock.competitor("b", 2.0)], repeats=2, warmup=1, clock=clock)
    assert clock.log == ["a", "check A", "b", "check B", "a", "b", "a", "b", "a", "b"]


def test_only_the_job_is_timed() -> None:
    clock = Clock()
    found = measure([clock.competitor("a", 1.0), clock.competitor("bb", 2.5)], repeats=3, warmup=0, clock=clock)
    assert found["a"].seconds == (1.0,) * 3
    assert found["bb"].seconds == (2.5,) * 3
    assert found["bb"].facts == {"size": 2}


def test_nothing_is_timed_when_a_result_is_wrong() -> None:
    clock = Clock()
    read: list[float] = []
    competitors = [clock.competitor("a", 1.0), clock.competitor("b", 1.0, valid=False)]
    with pytest.raises(BenchmarkError, match="b: wrong result"):
        measure(competitors, repeats=3, warmup=1, clock=lambda: read.append(0.0) or 0.0)
    assert not read
    assert clock.log == ["a", "check A", "b", "check B"]


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_counts_that_make_no_sense_are_refused(repeats: int, warmup: int) -> None:
    with pytest.raises(BenchmarkError, match="at least"):
        measure([], repeats, warmup)


def test_summary_gives_median_and_interquartile_range_in_milliseconds() -> None:
    assert summary([0.004, 0.001, 0.003, 0.002]) == pytest.approx((2.5, 1.5))
    assert summary([0.007]) == pytest.approx((7.0, 0.0))


def test_the_table_has_a_row_for_each_competitor_and_the_ratio_to_the_first() -> None:
    head, rule, ours, other = table(series()).splitlines()
    assert head == (
        "| competitor | median ms | IQR ms | ratio to ours | MACs after | peak extra memory MB | x weights | notes |"
    )
    assert rule.count("---") == 8
    assert ours == "| slimbridge | 250.0 | 150.0 | 1.00 | 1,234,567 | not measured |  | ours |"
    assert other == "| Other | 500.0 | 0.0 | 2.00 | 9 | 205 | 2.05 | theirs |"


def test_a_record_without_the_weights_size_has_no_multiple_of_it() -> None:
    old = series().model_copy(update={"weights_bytes": None})
    assert table(old).splitlines()[-1] == "| Other | 500.0 | 0.0 | 2.00 | 9 | 205 |  | theirs |"


def test_a_case_with_a_slow_competitor_runs_fewer_times_unless_a_number_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        program, "run_series", lambda name, framework, repeats, threads: asked.append(repeats) or series()
    )
    names = ["--case", "prune_resnet50", "--case", "fpgm_resnet18", "--output", str(tmp_path)]
    assert program.main(names) == 0
    assert program.main([*names, "--repeats", "5"]) == 0
    assert asked == [REPEATS] * 2 + [case("fpgm_resnet18").repeats] * 2 + [5] * 4
    assert case("fpgm_resnet18").repeats < REPEATS


def test_the_page_says_where_and_with_what_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program, "run_series", lambda name, framework, repeats, threads: series())
    assert program.main(["--case", "prune_resnet50", "--repeats", "4", "--output", str(tmp_path)]) == 0
    page = (tmp_path / "RESULTS.md").read_text()
    for part in ("numpy 1.26.4", "threads: 2", "OMP_NUM_THREADS=2", "4 repetitions", "load average 0.2 before, 1.3"):
        assert part in page
    for part in (machine.processor(), f"{machine.cores()} cores", machine.commit(), "## prune_resnet50", "### paddle"):
        assert part in page
    assert "trace_resnet50" not in page


def test_a_case_that_is_not_run_keeps_its_earlier_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "run_series", lambda name, framework, repeats, threads: series())
    for name in cases():
        assert program.main(["--case", name, "--output", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "results.json").read_text())
    assert set(data["cases"]) == set(cases())
    results = read_results(tmp_path / "results.json")
    assert results.cases["prune_resnet50"].series["torch"] == series()
    assert markdown(results) == (tmp_path / "RESULTS.md").read_text()


def test_a_wrong_name_gives_the_nearest_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--case", "prune_resnet5", "--output", str(tmp_path)]) == 1
    assert "did you mean 'prune_resnet50'?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--threads", "0"], ["--output", "/nowhere/at/all"]])
def test_bad_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(arguments) == 1
    assert arguments[0] in capsys.readouterr().err


def test_a_results_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert read_results(path) == Results()
    path.write_text('{"cases": {"x": 1}}')
    with pytest.raises(BenchmarkError, match=r"not a results file: cases\.x"):
        read_results(path)


def test_a_failing_process_is_reported_with_its_own_words() -> None:
    with pytest.raises(BenchmarkError, match="no series for 'jax'; it has: torch, paddle"):
        worker.run_series("prune_resnet50", "jax", 1, 1)


def test_every_case_compares_ours_with_another_on_both_frameworks() -> None:
    for name in cases():
        assert set(case(name).series) == {"torch", "paddle"}
    with pytest.raises(BenchmarkError, match="has no series"):
        series_of("prune_resnet50", "jax")


def test_cases_import_no_framework_before_a_series_is_built() -> None:
    code = (
        "import sys, benchmarks.__main__; print([n for n in ('torch', 'paddle', 'torch_pruning') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is reset through Linux's /proc"
)
def test_peak_memory_sees_what_a_run_allocates_and_frees() -> None:
    size = 64_000_000
    found = peak_extra(lambda count: float(np.ones(count, np.uint8)[-1]), size)
    assert found is not None
    assert 0.9 * size < found < 1.5 * size


def test_the_commit_is_dirty_when_files_other_than_the_results_differ(tmp_path: Path) -> None:
    assert machine.commit(tmp_path) == "unknown"
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)
    clean = machine.commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "RESULTS.md").write_text("new")
    assert machine.commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("new")
    assert machine.commit(tmp_path) == f"{clean} (dirty)"


def test_a_distribution_that_is_missing_is_named() -> None:
    found = machine.versions(["numpy", "no-such-distribution"])
    assert found == {"numpy": np.__version__, "no-such-distribution": "not installed"}


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting("torch", "resnet18", FPGM)


def test_a_setting_prunes_its_network_by_its_stage(setting: Setting) -> None:
    model, decision = setting.prune(setting.copy())
    assert decision.importance == "fpgm"
    assert setting.check_ours((model, decision)).keys() == {"parameters after", "MACs after"}
    assert setting.like_ours(model) == {"arrays as ours": len(setting.weights)}
    assert setting.weights_bytes == 4 * sum(array.size for array in setting.weights.values())


def test_a_model_that_was_not_pruned_is_no_result(setting: Setting) -> None:
    with pytest.raises(BenchmarkError, match="11689512 parameters, 11689512 before"):
        setting.check_pruned(setting.copy())
    assert setting.like_ours(setting.model)["arrays as ours"] < len(setting.weights)


def test_a_removal_that_differs_from_zeroing_is_no_result(setting: Setting) -> None:
    model, decision = setting.prune(setting.copy())
    weight = setting.backend.read(model)["fc.weight"]
    setting.backend.write(model, {"fc.weight": weight[::-1]}, partial=True)
    with pytest.raises(BenchmarkError, match="removing differs from zeroing"):
        setting.check_ours((model, decision))


def test_a_missing_toolkit_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(BenchmarkError, match=r"pip install 'slimbridge\[bench\]'"):
        TorchPruning(None)
