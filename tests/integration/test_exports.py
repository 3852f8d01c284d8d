"""Exports of runs: true to the model, small, all or nothing; and the commands that write and time them."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import slimbridge as sb
from slimbridge import cli, exports
from slimbridge.deploy import trust
from slimbridge.errors import BackendError, ModelError, RunError
from slimbridge.exports import Exporter, export
from slimbridge.files import locked
from slimbridge.parity.tolerances import tolerance
from slimbridge.ports import Backend
from slimbridge.report.deploy_records import Exported
from slimbridge.runfolder import RunFolder
from tests.integration.quantized import PARTS, plan_of, quantized
from tests.integration.small_nets import DATA, TRAIN, Plain, net, other
from tests.integration.test_pruning_resume import Killing
from tests.integration.test_quantize_runs import SETTINGS

SAMPLES = 8
ZOO: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "resnet18_small", "options": {"width": 8}},
    "data": {"name": "digits"},
    "stages": [{"kind": "quantize", "calibration_batches": 2}],
}


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to see that outputs are the model's."""
    monkeypatch.setattr(exports, "PROBE", SAMPLES)


@pytest.fixture(scope="module")
def zoo_run(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a zoo model, quantized as it is."""
    path = tmp_path_factory.mktemp("zoo") / backend.name
    sb.compress(None, ZOO, backend=backend.name, run_dir=path)
    return path


@pytest.fixture(scope="module")
def own_run(backend: Backend, baselines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a user's own model and data."""
    path = tmp_path_factory.mktemp("own") / backend.name
    quantized(backend.name, "residual", plan_of(baselines["residual"]), path)
    return path


def initialisers(path: Path) -> dict[str, Any]:
    model = onnx.load(str(path))
    return {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}


def left(run: Path) -> list[str]:
    """What lies in the folder of exports."""
    return sorted(str(file.relative_to(run / "exports")) for file in (run / "exports").rglob("*") if file.is_file())


def test_a_quantized_run_as_onnx(backend: Backend, zoo_run: Path) -> None:
    """Every weight in int8, a quarter of the float file, and outputs as the model's."""
    (record,) = export(zoo_run, ["onnx"])
    assert record.difference <= tolerance("export").value
    assert record.agreement == 1
    assert (record.form, record.of, record.integer, record.samples) == ("onnx", "compressed", True, SAMPLES)
    folder = RunFolder(zoo_run)
    decision = folder.decision("01-quantize")
    found = initialisers(zoo_run / "exports/onnx/model.onnx")
    integers = [array for array in found.values() if array.dtype == np.int8 and array.ndim > 1]
    assert sum(array.size for array in integers) == sum(a.size for a in folder.integers("01-quantize").values())
    assert decision is not None
    floats = (zoo_run / "00-baseline/weights.safetensors").stat().st_size
    assert record.size_bytes < 0.4 * floats
    assert left(zoo_run) == ["onnx/export.json", "onnx/model.onnx"]
    assert Exported.model_validate_json((zoo_run / "exports/onnx/export.json").read_bytes()) == record
    assert folder.complete_stages() == ("00-baseline", "01-quantize")


@pytest.mark.parametrize("name", ["4/4", "asymmetric", "dynamic", "groups"])
def test_every_kind_of_grid(backend: Backend, name: str, baselines: dict[str, Path], tmp_path: Path) -> None:
    part, stage, _ = SETTINGS[name]
    quantized(backend.name, part, plan_of(baselines[part], **stage), tmp_path / "run")
    (record,) = export(tmp_path / "run", ["onnx"], model=net(backend, PARTS[part]), data=DATA)
    assert record.difference <= tolerance("export").value
    assert record.samples == SAMPLES
    assert any(array.dtype == np.int8 for array in initialisers(tmp_path / "run/exports/onnx/model.onnx").values())


def test_a_trained_one(backend: Backend, baselines: dict[str, Path], tmp_path: Path) -> None:
    stage = {"qat": {"train": TRAIN, "batch_norm": "fold", "activation_ranges": "pact"}}
    quantized(backend.name, "residual", plan_of(baselines["residual"], **stage), tmp_path / "run")
    (record,) = export(tmp_path / "run", ["onnx"], model=net(backend, PARTS["residual"]), data=DATA)
    assert record.integer


def test_a_pruned_run_is_exported_in_float(backend: Backend, tmp_path: Path) -> None:
    plan = {"stages": [{"kind": "prune", "pruning_ratio": 0.5}]}
    sb.compress(net(backend), plan, data=DATA, run_dir=tmp_path / "run")
    given = {"model": net(backend), "data": DATA}
    exporter = Exporter(tmp_path / "run", **given)
    assert exporter.forms() == ("onnx",)
    found = [exporter.export("onnx"), exporter.export("onnx", "baseline")]
    assert [(record.of, record.integer) for record in found] == [("compressed", False), ("baseline", False)]
    assert all(record.difference <= tolerance("forward").value for record in found)
    assert found[0].size_bytes < found[1].size_bytes
    assert not any(array.dtype == np.int8 for array in initialisers(tmp_path / "run/exports/onnx/model.onnx").values())
    own = [form for form in backend.capabilities().forms if not form.endswith("_float")]
    for form in own:
        with pytest.raises(RunError, match=rf"'{form}' holds integers, and the run's last stage does not quantize"):
            export(tmp_path / "run", [form], **given)
    assert left(tmp_path / "run") == [
        f"{folder}/{file}" for folder in ("baseline-onnx", "onnx") for file in ("export.json", "model.onnx")
    ]


def test_a_model_of_the_users_own_is_needed(backend: Backend, own_run: Path) -> None:
    with pytest.raises(sb.SlimbridgeError, match=r"model") as caught:
        export(own_run, ["onnx"], data=DATA)
    assert len(str(caught.value).splitlines()) <= 2
    with pytest.raises(sb.SlimbridgeError, match=r"data"):
        export(own_run, ["onnx"], model=net(backend, PARTS["residual"]))
    with pytest.raises(RunError, match=rf"the model must be a {backend.name} model"):
        export(own_run, ["onnx"], model=net(other(backend), PARTS["residual"]), data=DATA)
    with pytest.raises(RunError, match=r"the model is not of this run's architecture"):
        export(own_run, ["onnx"], model=net(backend, Plain), data=DATA)
    assert not (own_run / "exports/.onnx.part").exists()


@pytest.mark.parametrize("form", ["onxn", "onnx_float", "tflite"])
def test_forms_that_there_are_not(backend: Backend, own_run: Path, form: str) -> None:
    with pytest.raises(BackendError, match=rf"{backend.name} exports no '{form}'.*it has: onnx, ") as caught:
        export(own_run, [form], model=net(backend, PARTS["residual"]), data=DATA)
    assert len(str(caught.value).splitlines()) == 1


def test_a_run_that_is_not_complete(backend: Backend, own_run: Path, tmp_path: Path) -> None:
    plan = {"stages": [{"kind": "quantize"}]}
    killing = Killing(("01-quantize: calibrating", 0))
    with pytest.raises(KeyboardInterrupt):
        sb.compress(net(backend), plan, data=DATA, run_dir=tmp_path / "run", progress=killing)
    with pytest.raises(RunError, match=r"not complete: 01-quantize missing; resume it first"):
        export(tmp_path / "run")
    with pytest.raises(RunError, match=r"not a run folder"):
        export(tmp_path)


@pytest.fixture
def exported(torch_backend: Backend, baselines: dict[str, Path], tmp_path: Path) -> tuple[Path, Callable[[], Any]]:
    """A run's folder with an export, and what exports it again."""
    quantized("torch", "residual", plan_of(baselines["residual"]), tmp_path / "run")

    def again() -> Any:
        return export(tmp_path / "run", ["onnx"], model=net(torch_backend, PARTS["residual"]), data=DATA)

    again()
    (tmp_path / "run/exports/onnx/old").write_text("an older one")
    return tmp_path / "run", again


def full(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_fails_leaves_the_older_export(
    exported: tuple[Path, Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs that differ, a runtime that fails, a disk that is full, a kill."""
    run, again = exported
    before = left(run)
    assert "onnx/old" in before

    def fails(words: str | None, error: type[BaseException]) -> None:
        with pytest.raises(error, match=words):
            again()
        assert left(run) == before
        assert not (run / "exports/.onnx.part").exists()

    with monkeypatch.context() as patch:
        nothing = replace(tolerance("export"), value=-1.0)
        patch.setattr(trust, "tolerance", lambda row: nothing)
        fails(r"its outputs differ from the model's by .* -1 is allowed.*;\nit was deleted", ModelError)
    with monkeypatch.context() as patch:
        patch.setattr(exports, "open_runtime", lambda *_, **__: lambda inputs: [np.full((1, 2), np.nan)])
        fails(r"its outputs differ from the model's by inf", ModelError)
    with monkeypatch.context() as patch:
        patch.setattr(exports, "open_runtime", lambda *_, **__: lambda inputs: [np.zeros((1, 3))])
        fails(r"its outputs have 3 entries a sample, the model's 2", ModelError)
    with monkeypatch.context() as patch:
        whole = Path.mkdir
        patch.setattr(Path, "mkdir", lambda path, **more: full() if path.suffix == ".part" else whole(path, **more))
        fails(r"exports/onnx: cannot be written: No space left on device", RunError)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        fails(r"No space left on device", RunError)
    with monkeypatch.context() as patch:
        patch.setattr(exports, "write_file", interrupted)
        fails(None, KeyboardInterrupt)
    with locked(run / ".lock"):
        fails(r"another process is working in it", RunError)


def interrupted(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_what_a_kill_left_is_swept_away(exported: tuple[Path, Callable[[], Any]]) -> None:
    run, again = exported
    part = run / "exports/.onnx.part"
    part.mkdir()
    (part / "model.onnx").write_bytes(b"half")
    again()
    assert left(run) == ["onnx/export.json", "onnx/model.onnx"]
    assert not part.exists()


def test_a_folder_that_cannot_be_written(backend: Backend, own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"model": net(backend, PARTS["residual"]), "data": DATA}
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(RunError, match=r"exports: cannot be made: No space left on device"):
        export(own_run, ["onnx"], **given)


# The commands


def call(arguments: list[str], capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    patch.setattr(sys, "argv", ["slimbridge", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code if isinstance(caught.value.code, int) else 0, captured.out, captured.err


def test_the_commands(
    backend: Backend, zoo_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured is in bench.json and in the run's reports."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    known = backend.capabilities()
    forms = tuple(form for form in known.forms if form in ("onnx_float", "paddle_int8"))  # others compile for long
    monkeypatch.setattr(type(backend), "capabilities", lambda self: replace(known, forms=forms))
    code, out, _ = call(["export", str(zoo_run), "--form", "onnx"], capsys, monkeypatch)
    assert code == 0
    assert "onnx: " in out
    assert f"{SAMPLES} samples" in out
    code, out, _ = call(["bench", str(zoo_run), "--rounds", "2", "--json"], capsys, monkeypatch)
    found = json.loads(out)
    assert code == 0
    assert (found["rounds"], found["threads"], found["batch"]) == (2, 1, 1)
    timed = {(row["form"], row["of"]) for row in found["timed"]}
    assert {("eager", "baseline"), ("onnx", "baseline"), ("onnx", "compressed")} <= timed, found["failed"]
    assert all(row["median_ms"] > 0 for row in found["timed"])
    assert {(item["form"], item["of"]) for item in found["exports"]} >= {("onnx", "baseline"), ("onnx", "compressed")}
    assert json.loads((zoo_run / "bench.json").read_text()) == found
    assert json.loads((zoo_run / "report.json").read_text())["deployment"] == found
    assert "onnxruntime" in (zoo_run / "report.html").read_text()
    resumed = sb.compress(None, ZOO, backend=backend.name, run_dir=zoo_run, resume=True)
    assert resumed.report.deployment is not None


RECORD = Exported(
    form="onnx",
    of="compressed",
    folder="exports/onnx",
    size_bytes=10,
    integer=True,
    difference=0.001,
    agreement=None,
    samples=8,
    compared_in="a runtime",
)


def test_commands_that_fail_and_json_alone(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["export", str(tmp_path)], ["bench", str(tmp_path)], ["export", str(own_run)]):
        code, out, err = call(arguments, capsys, monkeypatch)
        assert (code, out) == (2, "")
        assert err.startswith("slimbridge: ")
        assert len(err.splitlines()) <= 2
    monkeypatch.setattr(exports, "export", lambda *_, **__: (RECORD,))
    code, out, _ = call(["export", str(own_run), "--json"], capsys, monkeypatch)
    assert (code, json.loads(out)) == (0, [RECORD.model_dump(mode="json")])
    code, _, err = call(["bench", str(own_run), "--rounds", "0"], capsys, monkeypatch)
    assert code == 2
    assert "rounds" in err


def test_bench_refuses_what_makes_no_sense(own_run: Path) -> None:
    for wrong in (0, 1.5, "2", True):
        with pytest.raises(RunError, match=r"rounds must be a whole number of 1 or more, found"):
            sb.bench(own_run, rounds=wrong)  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"forms are words such as 'onnx', found 3"):
        sb.export(own_run, [3])  # type: ignore[list-item]


def test_data_may_be_a_pair_as_for_compress(backend: Backend, baselines: dict[str, Path], tmp_path: Path) -> None:
    quantized(backend.name, "residual", plan_of(baselines["residual"]), tmp_path / "run")
    pair = tuple((part.inputs, part.targets) for part in (DATA.train, DATA.test))
    (record,) = export(tmp_path / "run", "onnx", model=net(backend, PARTS["residual"]), data=pair)  # type: ignore[arg-type]
    assert record.samples == SAMPLES


def test_a_batch_norm_without_parameters_runs_in_paddle_inference(tmp_path: Path) -> None:
    import paddle

    def made() -> Any:
        norm = paddle.nn.BatchNorm2D(4, weight_attr=False, bias_attr=False)
        return paddle.nn.Sequential(
            paddle.nn.Conv2D(3, 4, 3), norm, paddle.nn.ReLU(), paddle.nn.Flatten(), paddle.nn.Linear(144, 2)
        )

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((24, 3, 8, 8)).astype(np.float32), rng.integers(0, 2, 24)
    data = ((x, y), (x, y))
    sb.compress(made(), {"stages": [{"kind": "quantize"}]}, data=data, run_dir=tmp_path / "run")
    (record,) = sb.export(tmp_path / "run", "paddle_int8", model=made(), data=data)
    assert record.difference <= tolerance("export_runtime").value
