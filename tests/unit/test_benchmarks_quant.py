"""The harness' parts that the cases of quantization need, and the cases on small images."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from benchmarks import cases, int8_series, machine, ptq_series, qat_series, worker
from benchmarks.cases import case
from benchmarks.harness import BenchmarkError, Case, Competitor, Series, measure
from benchmarks.quant_setting import FARTHEST, FLOAT_DIFFERENCE, FULL, RESNET18, Network, fused, size_of
from benchmarks.quant_toolkits import Images, Nncf
from benchmarks.records import Row, SeriesRecord
from benchmarks.table import table

SIZE = 32


def record(peak: int | None = None, faster: bool = True) -> SeriesRecord:
    rows = (
        Row(name="eager", note="", seconds=(0.4,), facts={}),
        Row(name="int8", note="", seconds=(0.1,), facts={}, peak_extra_bytes=peak),
    )
    return SeriesRecord(
        rows=rows,
        warmup=0,
        threads=1,
        settings={},
        versions={},
        load_before=0,
        load_after=0,
        weights_bytes=1_000_000,
        ratio="times as fast as eager",
        faster=faster,
    )


def test_a_series_says_what_its_ratio_is_and_which_way_it_goes() -> None:
    head, _, first, second = table(record()).splitlines()
    assert head == "| competitor | median ms | IQR ms | times as fast as eager | notes |"
    assert first == "| eager | 400.0 | 0.0 | 1.00 |  |"
    assert second == "| int8 | 100.0 | 0.0 | 4.00 |  |"
    assert "| int8 | 100.0 | 0.0 | 0.25 |  |" in table(record(faster=False))


def test_memory_has_columns_where_a_row_was_measured() -> None:
    head, _, first, second = table(record(2_000_000)).splitlines()
    assert head.endswith("| peak extra memory MB | x weights | notes |")
    assert first.endswith("| not measured |  |  |")
    assert second.endswith("| 2 | 2.00 |  |")


def counted(runs: list[str]) -> Competitor:
    def run(prepared: str) -> str:
        runs.append(prepared)
        return prepared

    def check(result: str) -> Mapping[str, int]:
        assert result == "short"
        return {}

    return Competitor("a", lambda: "long", run, check, trial=lambda: "short")


def test_a_short_run_stands_for_the_long_one_wherever_nothing_is_timed() -> None:
    runs: list[str] = []
    measure([counted(runs)], repeats=2, warmup=1)
    assert runs == ["short", "short", "long", "long"]


def test_a_case_says_how_often_it_is_warmed_up_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    item = Case("x", "", {"torch": lambda: Series((counted(runs),), (), 1, 1, "r", True)}, warmup=0, memory_runs=1)
    monkeypatch.setattr(cases, "_CASES", (item,))
    found = worker.time_series("x", "torch", 2)
    assert (found.warmup, found.ratio, found.faster, runs) == (0, "r", True, ["short", "long", "long"])
    runs.clear()
    worker.memory_of("x", "torch", "a")
    assert runs == ["short", "long"]


def test_a_case_without_memory_runs_starts_no_process_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def process(threads: int, name: str, framework: str, *arguments: str) -> bytes:
        asked.append(arguments)
        return record().model_dump_json().encode()

    monkeypatch.setattr(worker, "_process", process)
    assert worker.run_series("int8_resnet18", "torch", 3, 1) == record()
    assert asked == [("--repeats", "3")]
    assert case("int8_resnet18").memory_runs == 0


@pytest.fixture(scope="module")
def network() -> Network:
    return Network("torch", size=SIZE)


def test_equal_numbers_give_equal_images_and_none_is_kept(network: Network) -> None:
    data = Images(lambda: network.batches(3), 3)
    first, again = list(data), list(data)
    assert len(data) == len(first) == 3
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0][0], first[1][0])
    assert first[0][0].shape == (1, 3, SIZE, SIZE)


def test_wrong_logits_are_no_result(network: Network) -> None:
    assert network.check(network.expected) == {"difference, per mille": 0}
    with pytest.raises(BenchmarkError, match=r"differ from the float model's by 2"):
        network.check(-network.expected)
    with pytest.raises(BenchmarkError, match="shape"):
        network.check(network.expected[:, :10])
    with pytest.raises(BenchmarkError, match="not finite"):
        network.check(np.full_like(network.expected, np.nan))


@pytest.fixture(scope="module")
def files(network: Network) -> int8_series.Files:
    return int8_series.Files(network, 2, RESNET18)


def test_a_file_that_does_not_fuse_is_no_result(files: int8_series.Files) -> None:
    path = files.plain
    assert size_of(path) == size_of(path.parent) == {"file kB": round(path.stat().st_size / 1000)}
    assert fused(path)["int8 convolutions"] == 0
    with pytest.raises(BenchmarkError, match="0 of 20 convolutions fused, expected 20"):
        fused(path, RESNET18)


def test_a_missing_toolkit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(BenchmarkError, match=r"'nncf' is not installed: pip install 'slimbridge\[bench\]'"):
        Nncf()


def facts(series: Series, *names: str) -> dict[str, Mapping[str, int]]:
    """Those competitors whose names begin so, run once."""
    chosen = [item for item in series.competitors if item.name.startswith(names)]
    assert len(chosen) >= len(names)
    return {name: timing.facts for name, timing in measure(chosen, 1, 0).items()}


def test_integer_files_of_resnet18_are_a_quarter_and_fused(files: int8_series.Files) -> None:
    theirs = int8_series.in_runtime("theirs", files.network, lambda: files.theirs, "onnxruntime")
    found = measure([*int8_series.both_float(files), *int8_series.both("ours", files), theirs], 1, 0)
    small, plain = found["ours, onnxruntime"].facts, found["float32, onnxruntime"].facts
    assert (small["int8 convolutions"], small["int8 adds"]) == (20, 8)
    assert found["ours, openvino"].facts["file kB"] == small["file kB"] < plain["file kB"] / 3
    assert 0 < small["difference, per mille"] <= 1000 * FARTHEST
    assert plain["difference, per mille"] <= 1000 * FLOAT_DIFFERENCE


def test_the_files_of_paddle_inference() -> None:
    series = int8_series.resnet18_paddle(size=SIZE, images=2)
    found = facts(series, "Paddle Inference", "slimbridge paddle_int8")
    assert found["slimbridge paddle_int8, Paddle Inference"]["file kB"] < found["Paddle Inference fp32"]["file kB"] / 3
    assert (series.ratio, series.faster) == ("times as fast as Paddle Inference fp32", True)


def test_the_calibrations_of_torch() -> None:
    names = ("forward", "slimbridge min/max", "slimbridge MSE", "torchao")
    found = facts(ptq_series.resnet18_torch(size=SIZE, images=2, few=1), *names)
    assert found["slimbridge min/max, layer"]["tensors"] < found["slimbridge min/max, full"]["tensors"]
    assert found["forward passes alone"] == {"images": 2, "difference, per mille": 0}
    assert all(row["difference, per mille"] > 0 for name, row in found.items() if name != "forward passes alone")


def test_the_calibrations_of_paddle() -> None:
    names = ("forward", "slimbridge min/max, full", "paddle.quantization Absmax")
    found = facts(ptq_series.resnet18_paddle(size=SIZE, images=2), *names)
    assert all(row["images"] == 2 for row in found.values())


@pytest.mark.parametrize("build", [qat_series.resnet18_torch, qat_series.resnet18_paddle])
def test_training_steps_under_quantization_start_near_the_float_one(build: Callable[..., Series]) -> None:
    losses = [row["first loss, thousandths"] for row in facts(build(size=SIZE, batch=4), "").values()]
    assert len(set(losses)) == len(losses) == 4


def test_nothing_quantized_is_no_result() -> None:
    steps = qat_series.Steps(Network("torch", size=SIZE, batch=2))
    with pytest.raises(BenchmarkError, match="nothing was quantized"):
        measure([steps.competitor("x", steps.plain)], 1, 0)


def test_a_decision_without_all_layers_is_no_result(network: Network) -> None:
    stage: Any = FULL.model_copy(update={"ignored_layers": ("fc",)})
    with pytest.raises(BenchmarkError, match="20 of 21 layers"):
        measure([ptq_series.Work(network, 1).ours("x", stage)], 1, 0)


def test_cases_import_no_toolkit_before_a_series_is_built() -> None:
    names = ("torch", "paddle", "nncf", "openvino", "onnxruntime", "onnx")
    code = f"import sys, benchmarks.__main__; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
