"""The command line: what it loads, what it prints, how it fails; and what imports without a framework."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slimbridge import __version__, cli, zoo
from slimbridge.conformance import operations
from slimbridge.plan import load_plan, plan_to_yaml

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("torch", "paddle", "paddleslim", "torchao", "torch_pruning")
CORE = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.glob("slimbridge/**/*.py")
    if path.stem != "__main__"
)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def call(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["slimbridge", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    code = caught.value.code
    return code if isinstance(code, int) else 0, captured.out, captured.err


# What is loaded


def test_help_loads_nothing_heavy() -> None:
    heavy = (*FRAMEWORKS, "numpy", "scipy", "pydantic", "sklearn", "plotly", "slimbridge_torch", "slimbridge_paddle")
    done = python(
        "import sys\n"
        "from slimbridge.cli import main\n"
        "sys.argv = ['slimbridge', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"loaded = [name for name in {heavy} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    assert done.returncode == 0, done.stderr
    for command in ("run", "check", "parity", "study", "conformance", "inspect"):
        assert command in done.stdout


def test_the_core_imports_without_a_framework() -> None:
    """Every module, in one process in which no framework can be imported."""
    done = python(
        "import importlib, sys\n"
        f"frameworks = {(*FRAMEWORKS, 'slimbridge_torch', 'slimbridge_paddle')}\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in frameworks:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "for name in sys.argv[1:]:\n    importlib.import_module(name)\n"
        "import slimbridge\n"
        "assert all(hasattr(slimbridge, name) for name in slimbridge.__all__)\n"
        "assert not [name for name in frameworks if name in sys.modules]\n",
        *CORE,
    )
    assert done.returncode == 0, done.stderr
    assert len(CORE) > 40


@pytest.mark.parametrize(("missing", "there"), [("torch", "paddle"), ("paddle", "torch")])
def test_with_one_framework_the_other_is_an_error_that_says_what_to_install(missing: str, there: str) -> None:
    done = python(
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {missing!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from slimbridge.check import check\n"
        "from slimbridge.cli import main\n"
        "assert check('digits') == []\n"
        f"assert {there!r} in sys.modules and {missing!r} not in sys.modules\n"
        f"sys.argv = ['slimbridge', 'inspect', 'lenet', '--backend', {missing!r}]\n"
        "main()\n"
    )
    assert done.returncode == 2
    line = f"slimbridge: backend '{missing}' needs '{missing}', which is not installed: pip install "
    assert line in done.stderr, done.stderr
    assert f"[{missing}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "slimbridge", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, __version__, "")


# Errors


@pytest.fixture
def wrong_option(tmp_path: Path) -> str:
    path = tmp_path / "wrong.yaml"
    path.write_text("stages:\n  - {kind: prune, pruning_ration: 0.5, pruning_ratio: 0.5}\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def full(tmp_path: Path) -> str:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    return str(tmp_path / "full")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "digit"], "no plan 'digit': neither a file nor shipped (did you mean 'digits'?)"),
        (["run", "digits", "--backend", "pytorch"], "backend 'pytorch' is unknown (did you mean 'torch'?)"),
        (["run", "WRONG"], "unknown key 'pruning_ration' (did you mean 'pruning_ratio'?)"),
        (["run", "digits", "-o", "FULL"], "exists and is not empty; resume it, or name another folder"),
        (["run", "digits", "-o", "FULL", "--backend", "torch", "--backend", "paddle"], "exists and is not empty"),
        (["run", "digits", "-o", "FULL/run", "--baseline", "none.safetensors"], "cannot be read"),
        (["parity", "FULL", "FULL"], "not a run folder (it has no plan.yaml and run.json)"),
        (["parity", "nowhere", "nowhere"], "not a run folder"),
        (["conformance", "--backend", "jax"], "backend 'jax' is unknown"),
        (["inspect", "resnet81"], "zoo model 'resnet81' is unknown (did you mean 'resnet18'?)"),
    ],
)
def test_an_error_is_a_line_or_two_and_exit_code_2(
    arguments: list[str],
    words: str,
    wrong_option: str,
    full: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = [word.replace("WRONG", wrong_option).replace("FULL", full) for word in arguments]
    code, out, err = call(made, capsys, monkeypatch)
    assert code == 2
    assert words in err, err
    assert "Traceback" not in err
    assert 1 <= len(err.splitlines()) <= 2
    assert all(line.startswith("slimbridge: ") for line in err.splitlines())
    assert out == ""
    assert [path.name for path in Path(full).iterdir() if path.name != "run"] == ["note.txt"]


def test_every_mistake_of_a_plan_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.yaml").write_text("sed: 1\nstages:\n  - {kind: prune}\n  - {kind: prunee}\n", encoding="utf-8")
    code, _, err = call(["run", str(tmp_path / "p.yaml")], capsys, monkeypatch)
    assert (code, len(err.splitlines())) == (2, 3)


@pytest.mark.parametrize(
    "arguments",
    [["runn", "digits"], ["run"], ["run", "digits", "--device", "tpu"], ["inspect", "lenet", "--imagesize", "3"]],
)
def test_a_wrong_command_or_option(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = call(arguments, capsys, monkeypatch)
    assert code == 2
    assert "Traceback" not in err


# Outputs


def test_check_as_text_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(["check", "digits", "--backend", "torch"], capsys, monkeypatch)
    assert (code, out) == (0, "digits: no mistake found\n")
    code, out, _ = call(["check", "digits", "--backend", "torch", "--json"], capsys, monkeypatch)
    assert json.loads(out) == {"plan": "digits", "ok": True, "findings": []}
    path = tmp_path / "p.yaml"
    path.write_text(plan_to_yaml(load_plan("digits")).replace("layer4.1.conv2", "layer4.1.cnv2"), encoding="utf-8")
    code, out, _ = call(["check", str(path), "--backend", "torch", "--json"], capsys, monkeypatch)
    found = json.loads(out)
    assert code == 1
    assert not found["ok"]
    assert "did you mean 'layer4.1.conv2'" in found["findings"][0]


@pytest.mark.parametrize("backend", ["torch", "paddle"])
def test_inspect_as_json(backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = call(["inspect", "lenet", "--backend", backend, "--json"], capsys, monkeypatch)
    facts = json.loads(out)
    assert code == 0
    assert facts["model"] == "lenet"
    assert facts["backend"] == backend
    assert facts["input"] == [1, 1, 28, 28]
    assert facts["macs"] == sum(layer["macs"] for layer in facts["layers"])
    assert facts["unknown"] == []
    assert facts["layers"][-1]["frozen"] == "its channels are an output of the model"
    first = facts["layers"][0]
    assert first["group"] == 1
    assert first["frozen"] is None


def test_inspect_as_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = call(["inspect", "lenet", "--image-size", "28"], capsys, monkeypatch)
    assert code == 0
    layers = [node for node in zoo.build("lenet", "torch").state_dict() if node.endswith("weight")]
    assert all(name.removesuffix(".weight") in out for name in layers)


def test_conformance_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"values": operations.values, "rounding": operations.rounding}
    monkeypatch.setattr("slimbridge.conformance.suite.CASES", kept)
    code, out, _ = call(["conformance", "--backend", "torch", "--json"], capsys, monkeypatch)
    found = json.loads(out)
    assert code == 0
    assert found["passed"]
    assert [outcome["case"] for outcome in found["cases"]] == list(kept)


def test_a_failed_case_is_exit_code_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: object) -> None:
        raise AssertionError("on purpose")

    monkeypatch.setattr("slimbridge.conformance.suite.CASES", {"a case": broken})
    code, out, _ = call(["conformance", "--backend", "torch"], capsys, monkeypatch)
    assert code == 1
    assert "FAIL  a case" in out
    assert "raised AssertionError: on purpose" in out
    assert "0 of 1 cases pass" in out


# Studies


def arguments_of_study(*more: str) -> list[str]:
    return ["study", "digits", "--vary", "stages[0].importance=l1_norm,l2_norm", "--backend", "torch", *more]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["study", "digits", "--vary", "seed=0,1"], "--backend: name the backend, or several"),
        (["study", "digits", "--backend", "torch"], "nothing to vary"),
        (["study", "digits", "--backend", "torch", "--vary", "seed"], "--vary seed: found no '='"),
        (["study", "digits", "--backend", "torch", "--vary", "seed=0"], "at least two are needed"),
        (arguments_of_study("--backend", "torch"), "backends: one is named twice"),
        (arguments_of_study("--backend", "pytorch"), "did you mean 'torch'?"),
        (arguments_of_study("--seeds", "a"), "'a' is no seed"),
        (arguments_of_study("--vary", "stages[0].importanc=1,2"), "did you mean 'importance'?"),
        (arguments_of_study("--vary", "stages[9].importance=1,2"), "'9' is none of the 3 places"),
    ],
)
def test_a_mistake_in_a_study_is_a_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, err = call([*arguments, "-o", str(tmp_path / "s")], capsys, monkeypatch)
    assert (code, out) == (2, "")
    assert words in err
    assert all(line.startswith("slimbridge: ") for line in err.splitlines())
    assert not (tmp_path / "s").exists()


def test_a_study_in_which_runs_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, all runs listed, and the study's folder is there."""
    monkeypatch.setattr("slimbridge.study.runs.run_process", lambda arguments, say: f"no luck with {arguments[3]}")
    folder = str(tmp_path / "s")
    code, out, _ = call(arguments_of_study("--seeds", "0,1", "-o", folder, "--json"), capsys, monkeypatch)
    found = json.loads(out)
    assert code == 1
    assert [run["folder"] for run in found["runs"]] == [
        f"{name}-seed{seed}/torch" for name in ("l1_norm", "l2_norm") for seed in (0, 1)
    ]
    assert {run["error"] for run in found["runs"]} == {"no luck with torch"}
    code, out, err = call(arguments_of_study("--seeds", "0,1", "-o", folder), capsys, monkeypatch)
    assert code == 2
    assert "exists and is not empty; resume it" in err
    code, out, _ = call(arguments_of_study("--seeds", "0,1", "-o", folder, "--resume"), capsys, monkeypatch)
    assert code == 1
    assert "4 of 4 runs failed" in out
    assert "l1_norm-seed0/torch: no luck with torch" in out
