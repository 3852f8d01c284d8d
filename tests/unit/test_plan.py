"""Plans: shipped ones, YAML and back, mistakes and what is said about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from slimbridge.errors import PlanError
from slimbridge.plan import Plan, PruneStage, load_plan, make_plan, plan_to_yaml, shipped_plans
from slimbridge.plan.loading import LARGEST, MOST_VALUES
from slimbridge.plan.registries import ALL, IMPORTANCES

PRUNE = {"kind": "prune", "pruning_ratio": 0.5}
QUANTIZE = {"kind": "quantize"}
FINETUNE = {"kind": "finetune", "train": {"epochs": 1}}


def plan(*stages: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"stages": list(stages) or [PRUNE], **rest}


def findings(values: Any, source: str = "plan") -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        make_plan(values, source)
    assert str(caught.value) == "\n".join(caught.value.findings)
    return caught.value.findings


def of_file(path: Path, text: str | bytes) -> tuple[str, ...]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    found = caught.value.findings
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in found), found
    return found


# Good plans


@pytest.mark.parametrize("name", shipped_plans())
def test_a_shipped_plan_loads_and_comes_back(name: str, tmp_path: Path) -> None:
    loaded = load_plan(name)
    assert loaded.name == name
    (tmp_path / "plan.yaml").write_text(plan_to_yaml(loaded), encoding="utf-8")
    assert load_plan(tmp_path / "plan.yaml") == loaded
    assert load_plan(str(tmp_path / "plan.yaml")) == loaded
    assert load_plan(loaded) is loaded


def test_the_saved_plan_holds_every_default() -> None:
    saved = yaml.safe_load(plan_to_yaml(make_plan(plan(PRUNE, {**FINETUNE}, QUANTIZE), "plan")))
    assert saved["seed"] == 0
    assert saved["device"] == "cpu"
    assert saved["baseline"] == {"weights": None, "train": None}
    prune, finetune, quantize = saved["stages"]
    assert set(prune) == set(PruneStage.model_fields)
    given = {"kind": "prune", "importance": "l1_norm", "pruning_ratio": 0.5, "ignored_layers": [], "finetune": None}
    meant = {"selection": "local", "preset": None, "rated": None, "count_rule": None, "round_to": 1, "max_ratio": None}
    assert {**prune, **given, **meant} == prune
    assert finetune["train"]["optimizer"] == {
        "kind": "sgd",
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 0.0001,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
    }
    assert quantize["observer"] == "moving_average"
    assert quantize["calibration_batches"] == 8


def test_a_plan_of_everything_comes_back_equal() -> None:
    stages = [
        {**PRUNE, "ignored_layers": ["layer4.*", "fc"], "finetune": {"epochs": 2, "schedule": "linear"}},
        {
            "kind": "distill",
            "teacher": {"model": {"name": "resnet18_small", "options": {"width": 8}}, "weights": "t.safetensors"},
            "losses": [{"loss": "l2_feature", "student": "a", "teacher": "b"}, {"loss": "soft_labels"}],
            "train": {"epochs": 1, "optimizer": {"kind": "adam", "betas": [0.8, 0.99]}},
        },
        {**QUANTIZE, "observer_options": {"rate": 0.5}},
    ]
    made = make_plan(plan(*stages, name="größe", seed=3, model={"name": "lenet"}, data={"name": "digits"}), "plan")
    assert make_plan(yaml.safe_load(plan_to_yaml(made)), "plan") == made
    assert isinstance(made.stages[1].train.optimizer.betas, tuple)  # type: ignore[union-attr]


def test_a_plan_cannot_be_changed() -> None:
    made = make_plan(plan(), "plan")
    with pytest.raises(ValueError, match=r"frozen"):
        made.seed = 1  # type: ignore[misc]


# Mistakes


def test_five_mistakes_give_five_lines(tmp_path: Path) -> None:
    text = """
sed: 1
task: clasification
baseline:
  train: {epochs: 0, optimizer: {momentm: 0.9}}
stages:
  - {kind: prune, pruning_ratio: 0.5, importance: l1norm}
"""
    path = tmp_path / "my.yaml"
    found = of_file(path, text)
    assert len(found) == 5
    by_place = {line.split(": ")[1]: line for line in found}
    assert "unknown key 'sed' (did you mean 'seed'?)" in by_place["sed"]
    assert "found 'clasification' (did you mean 'classification'?); allowed: classification" in by_place["task"]
    assert "found 0" in by_place["baseline.train.epochs"]
    assert "unknown key 'momentm' (did you mean 'momentum'?)" in by_place["baseline.train.optimizer.momentm"]
    assert "unknown importance 'l1norm' (did you mean 'l1_norm'?)" in by_place["stages[0].importance"]


@pytest.mark.parametrize(
    ("stage", "place", "words"),
    [
        ({"kind": "prune"}, "stages[0]", "says not how much: pruning_ratio, layer_ratios, target or sensitivity"),
        ({**PRUNE, "preset": "torch-pruning"}, "stages[0].preset", "found 'torch-pruning'"),
        ({**PRUNE, "count_rule": "floor"}, "stages[0].count_rule", "found 'floor'"),
        ({**PRUNE, "pruning_ratio": "half"}, "stages[0].pruning_ratio", "found 'half'"),
        ({**PRUNE, "pruning_ratio": 1.0}, "stages[0].pruning_ratio", "found 1.0"),
        ({**PRUNE, "pruning_ratio": float("nan")}, "stages[0].pruning_ratio", "found nan"),
        ({**PRUNE, "ignored_layers": "conv"}, "stages[0].ignored_layers", "found 'conv'"),
        ({**PRUNE, "kind": "prun"}, "stages[0]", "(did you mean 'prune'?)"),
        ({"pruning_ratio": 0.5}, "stages[0]", "has no 'kind'; allowed: prune, sparsify, distill, quantize, finetune"),
        ({**QUANTIZE, "weight_bits": 9}, "stages[0].weight_bits", "found 9"),
        ({**QUANTIZE, "observer": "abs_max"}, "stages[0].observer", "(did you mean 'absmax'?)"),
        ({"kind": "finetune", "train": {"epochs": 1.5}}, "stages[0].train.epochs", "found 1.5"),
        ({"kind": "finetune", "train": {"epochs": True}}, "stages[0].train.epochs", "found True"),
        (
            {"kind": "finetune", "train": {"epochs": 1, "schedule": "cosin"}},
            "stages[0].train.schedule",
            "(did you mean 'cosine'?)",
        ),
        (
            {"kind": "distill", "losses": [], "train": {"epochs": 1}},
            "stages[0].losses",
            "must not be empty",
        ),
        (
            {"kind": "distill", "losses": [{"loss": "l2_feature"}], "train": {"epochs": 1}},
            "stages[0].losses[0]",
            "needs 'student' and 'teacher'",
        ),
        (
            {"kind": "distill", "losses": [{"loss": "hard_labels", "temperature": 2.0}], "train": {"epochs": 1}},
            "stages[0].losses[0]",
            "takes no 'temperature'",
        ),
        (
            {
                "kind": "distill",
                "losses": [{"loss": "hard_labels"}],
                "train": {"epochs": 1},
                "teacher": {"model": "baselin"},
            },
            "stages[0].teacher.model",
            "found 'baselin' (did you mean 'baseline'?)",
        ),
    ],
)
def test_a_mistake_says_where_what_and_what_is_allowed(stage: dict[str, Any], place: str, words: str) -> None:
    found = findings(plan(stage), "x.yaml")
    assert all("\n" not in line for line in found)
    mine = [line for line in found if line.startswith(f"x.yaml: {place}: ")]
    assert mine, found
    assert words in mine[0], mine


def test_quantization_comes_last_and_once() -> None:
    for stages in ((QUANTIZE, PRUNE), (PRUNE, QUANTIZE, FINETUNE), (QUANTIZE, QUANTIZE)):
        (found,) = findings(plan(*stages))
        assert "static quantization comes last, once" in found
    assert make_plan(plan(PRUNE, QUANTIZE), "plan").stages[-1].kind == "quantize"


@pytest.mark.parametrize("stages", [[], None, "prune", {"kind": "prune"}])
def test_stages_must_be_a_list_of_at_least_one(stages: Any) -> None:
    assert findings({"stages": stages})[0].startswith("plan: stages")


def test_options_hold_plain_values_only() -> None:
    (found,) = findings(plan(PRUNE, model={"name": "lenet", "options": {"width": [1, 2]}}))
    assert found.startswith("plan: model.options.width: found a list; allowed: a number")


# Files


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    (found,) = of_file(tmp_path / "p.yaml", "seed: 1\nstages: []\nseed: 2\n")
    assert "line 3" in found
    assert "'seed' stands twice" in found


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (found,) = of_file(tmp_path / "p.yaml", "\n".join(lines))
    assert f"holds more than {MOST_VALUES} values" in found


def test_an_alias_of_itself_is_refused(tmp_path: Path) -> None:
    assert len(of_file(tmp_path / "p.yaml", "stages: &a [*a]\n")) == 1


def test_an_alias_is_its_value(tmp_path: Path) -> None:
    text = """
stages:
  - {kind: finetune, train: &train {epochs: 3, batch_size: 7}}
  - {kind: finetune, train: {<<: *train, epochs: 4}}
"""
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    first, second = load_plan(tmp_path / "p.yaml").stages
    assert (first.train.epochs, second.train.epochs, second.train.batch_size) == (3, 4, 7)  # type: ignore[union-attr]


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!custom x"])
def test_tags_make_no_objects(tmp_path: Path, tag: str) -> None:
    (found,) = of_file(tmp_path / "p.yaml", f"name: {tag}\n")
    assert "not valid YAML" in found


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (found,) = of_file(tmp_path / "p.yaml", b"name: \xff\xfe\n")
    assert "not a text file (byte 6)" in found


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    (found,) = of_file(tmp_path / "p.yaml", "# " + "x" * 2_000_000)
    assert f"2000002 bytes; a plan has at most {LARGEST}" in found


@pytest.mark.parametrize(
    ("text", "kind"), [("", "NoneType"), ("# nothing\n", "NoneType"), ("- a\n- b\n", "list"), ("word", "str")]
)
def test_a_file_without_a_mapping(tmp_path: Path, text: str, kind: str) -> None:
    (found,) = of_file(tmp_path / "p.yaml", text)
    assert found.endswith(f"a plan is a mapping of keys; found {kind}")


@pytest.mark.parametrize("text", ["a: [1, 2", "a: b: c", "\tname: x", "a: 'x", "? [a, b]\n: c\n", "2001-99-99: x"])
def test_broken_yaml_is_one_line(tmp_path: Path, text: str) -> None:
    assert len(of_file(tmp_path / "p.yaml", text)) == 1


def test_nesting_without_end(tmp_path: Path) -> None:
    (found,) = of_file(tmp_path / "p.yaml", "a: " + "[" * 5000)
    assert "not valid YAML" in found


def test_a_name_that_is_no_plan() -> None:
    with pytest.raises(PlanError, match=r"no plan 'digit': .*\(did you mean 'digits'\?\); shipped: .*digits"):
        load_plan("digit")


def test_a_folder_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"neither a file nor shipped"):
        load_plan(tmp_path)


# Registries


def test_every_registered_name_is_listed_and_found() -> None:
    for registry in ALL:
        assert registry.names()
        for name in registry.names():
            assert registry.get(name) is not None


def test_a_name_is_registered_once() -> None:
    IMPORTANCES.names()
    with pytest.raises(Exception, match=r"importance 'l1_norm' is registered already"):
        IMPORTANCES.register("l1_norm")(lambda weight: weight)


def test_a_registered_importance_may_be_named_in_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IMPORTANCES, "_entries", dict(IMPORTANCES._entries))
    IMPORTANCES.register("mine")(lambda weight: weight)
    assert make_plan(plan({**PRUNE, "importance": "mine"}), "plan").stages[0].importance == "mine"  # type: ignore[union-attr]


def test_the_schema_is_documented() -> None:
    assert Plan.__doc__
    for name in Plan.model_fields:
        assert name in Plan.__doc__
