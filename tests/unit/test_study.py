"""Studies: what is varied, what is run, what is kept, and what the report says."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimbridge.errors import PlanError, RunError, SlimbridgeError
from slimbridge.parity.tolerances import tolerance
from slimbridge.plan import load_plan
from slimbridge.report.records import LatencyRecord, RunReport, StageRecord
from slimbridge.report.study_html import render_study_html
from slimbridge.report.study_records import Study, StudyRun, StudyStage, lines_of, read_study
from slimbridge.report.study_table import render_study
from slimbridge.runfolder import stage_names
from slimbridge.study import run_study
from slimbridge.study.process import run_process
from slimbridge.study.vary import combinations, parse_seeds, parse_vary

TRAIN = {"epochs": 1, "batch_size": 256}
PLAN = {
    "name": "tiny",
    "model": {"name": "lenet", "options": {"image_size": 12}},
    "data": {"name": "digits", "options": {"channels": 1, "image_size": 12}},
    "baseline": {"train": TRAIN},
    "stages": [{"kind": "prune", "pruning_ratio": 0.5}, {"kind": "finetune", "train": TRAIN}],
}
IMPORTANCE = "stages[0].importance"
RATIO = "stages[0].pruning_ratio"
VARY: dict[str, list[Any]] = {IMPORTANCE: ["l1_norm", "l2_norm"], RATIO: [0.25, 0.5]}
EXACT = tolerance("operation_float64").value
HOSTILE = "</script><script>alert(1)</script>\x1b[31m"


# What is varied


def test_values_are_read_as_yaml() -> None:
    texts = ["a=l1_norm, fpgm", "b=0.5,1e-3,2", "c=[x,y],[]", "d=true,null", "e[p.q]=1,2"]
    assert parse_vary(texts) == {
        "a": ["l1_norm", "fpgm"],
        "b": [0.5, 0.001, 2],
        "c": [["x", "y"], []],
        "d": [True, None],
        "e[p.q]": [1, 2],
    }
    assert [type(value) for value in parse_vary(["b=0.5,1e-3,2"])["b"]] == [float, float, int]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["seed"], "--vary seed: found no '='"),
        (["=1,2"], "found no '='"),
        (["seed=0,1", "seed=2,3"], "--vary seed: the path is there twice"),
        (["a=[x,y"], r"--vary a: '\[x,y' is not a list of YAML values"),
    ],
)
def test_what_cannot_be_read(texts: list[str], words: str) -> None:
    with pytest.raises(SlimbridgeError, match=words):
        parse_vary(texts)


def test_seeds_are_whole_numbers() -> None:
    assert parse_seeds("0, 1,2") == (0, 1, 2)
    assert parse_seeds(None) == ()
    for text in ("", "0,x", "0,,1", "-1", "1.5"):
        with pytest.raises(SlimbridgeError, match="is no seed"):
            parse_seeds(text)


def test_every_combination_has_its_plan() -> None:
    found = combinations(load_plan(PLAN), VARY)
    assert [c.name for c in found] == ["l1_norm-0.25", "l1_norm-0.5", "l2_norm-0.25", "l2_norm-0.5"]
    for combination in found:
        stage: Any = combination.plan.stages[0]
        assert combination.values == {IMPORTANCE: stage.importance, RATIO: stage.pruning_ratio}
        same = combination.plan.model_dump(exclude={"stages"})
        assert same == load_plan(PLAN).model_dump(exclude={"stages"})


@pytest.mark.parametrize(
    ("path", "values", "place"),
    [
        ("baseline.train.epochs", [1, 2], lambda plan: plan.baseline.train.epochs),
        ("stages[1].train.optimizer.kind", ["sgd", "adam"], lambda plan: plan.stages[1].train.optimizer.kind),
        ("stages[0].finetune.epochs", [1, 2], lambda plan: plan.stages[0].finetune.epochs),  # a section that is begun
        ("stages[0].layer_ratios[a.b]", [0.1, 0.2], lambda plan: plan.stages[0].layer_ratios["a.b"]),
        ("model.options.image_size", [12, 16], lambda plan: plan.model.options["image_size"]),
        ("stages[0].ignored_layers", [["conv1"], []], lambda plan: list(plan.stages[0].ignored_layers)),
    ],
)
def test_a_path_may_lead_anywhere(path: str, values: list[Any], place: Callable[[Any], Any]) -> None:
    assert [place(combination.plan) for combination in combinations(load_plan(PLAN), {path: values})] == values


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        ({"stages[0].importanc": ["a", "b"]}, r"importanc.*unknown key 'importanc' \(did you mean 'importance'\?\)"),
        ({IMPORTANCE: ["l1_norm", "l1_nrm"]}, r"importance=l1_nrm: stages\[0\]\.importance: .*did you mean 'l1_norm'"),
        ({RATIO: [0.5, 1.5]}, r"pruning_ratio=1\.5: stages\[0\]\.pruning_ratio: found 1\.5"),
        ({"stages[7].importance": ["a", "b"]}, "'7' is none of the 2 places of the list"),
        ({"stages.importance": ["a", "b"]}, "'importance' is none of the 2 places of the list"),
        ({"seed.x": [1, 2]}, "nothing can stand below 'seed', which is 0"),
        ({"": [1, 2]}, "not a path in a plan"),
        ({"stages[0": [1, 2]}, "not a path in a plan"),
        ({"[0].x": [1, 2]}, "not a path in a plan"),
        ({"stage..x": [1, 2]}, "not a path in a plan"),
        ({RATIO: [0.5]}, "1 value; at least two are needed, one belongs in the plan"),
        ({RATIO: []}, "0 value"),
        ({RATIO: [0.5, 0.25, 0.5]}, "the value 0.5 is there twice"),
        ({RATIO: "0.5"}, "a list of values is needed, found str"),
        ({"name": ["a", "b"]}, "backends are chosen by their own option, and names are made"),
        ({"backend": ["torch", "paddle"]}, "backends are chosen by their own option"),
        ({"stages[0].ignored_layers": [["a b"], ["a_b"]]}, "two combinations would have the name 'a_b'"),
    ],
)
def test_a_mistake_in_what_is_varied_is_one_line(vary: dict[str, Any], words: str) -> None:
    with pytest.raises(SlimbridgeError, match=words) as caught:
        combinations(load_plan(PLAN), vary)
    assert "\n" not in str(caught.value)


@given(st.lists(st.text(max_size=90), min_size=2, max_size=4, unique=True))
def test_names_are_fit_for_folders(values: list[str]) -> None:
    vary = {"stages[0].ignored_layers": [[value] for value in values]}
    try:
        found = combinations(load_plan(PLAN), vary)
    except SlimbridgeError as error:
        assert "two combinations would have the name" in str(error)  # noqa: PT017
        return
    assert all(re.fullmatch(r"[\w.+-]{1,60}", c.name) and c.name not in (".", "..") for c in found)
    assert len({c.name for c in found}) == len(values)


def test_the_plan_itself_is_left_as_it_was() -> None:
    plan = load_plan(PLAN)
    before = plan.model_dump()
    combinations(plan, {"stages[0].layer_ratios[conv1]": [0.1, 0.2], **VARY})
    assert plan.model_dump() == before


# What is run


class Runs:
    """Stands for the processes: leaves the report of a run, or fails as it is told."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.fails: Callable[[Path], str | None] = lambda folder: None

    def __call__(self, arguments: Sequence[str], say: Callable[[str], None]) -> str | None:
        self.asked.append(list(arguments))
        options = dict(zip(arguments[2::2], arguments[3::2], strict=False))
        folder, plan = Path(options["--output"]), load_plan(arguments[1])
        baseline = folder / stage_names(plan)[0]
        baseline.mkdir(parents=True, exist_ok=True)
        (baseline / "weights.safetensors").write_text("")
        if error := self.fails(folder):
            return error
        stage: Any = plan.stages[0]
        score = 0.9 + 0.01 * plan.seed - (0.1 if stage.importance == "l2_norm" else 0.0)
        write_report(folder, options["--backend"], stage_names(plan), score, stage.pruning_ratio)
        return None

    @property
    def folders(self) -> list[str]:
        return ["/".join(Path(a[a.index("--output") + 1]).parts[-2:]) for a in self.asked]

    def baselines(self) -> list[str | None]:
        found = [a[a.index("--baseline") + 1] if "--baseline" in a else None for a in self.asked]
        return [path and "/".join(Path(path).parts[-4:-2]) for path in found]


def write_report(folder: Path, backend: str, names: Sequence[str], score: float, ratio: float) -> None:
    latency = LatencyRecord(median_ms=1.0, spread_ms=0.1, runs=5, batch=1, threads=1, how="eager")
    stages = tuple(
        StageRecord(
            index=index,
            kind=name[3:],  # type: ignore[arg-type]
            name=name,
            metric=score - 0.05 * (index == 1),
            parameters=1000 if index == 0 else round(1000 * (1 - ratio)),
            macs=10_000 if index == 0 else round(10_000 * (1 - ratio) ** 2),
            size_bytes=4000,
            latency=latency,
            seconds=1.0,
            input_digest="",
        )
        for index, name in enumerate(names)
    )
    report = RunReport(
        plan="tiny", backend=backend, versions={}, machine="m", device="cpu", metric_name="accuracy", stages=stages
    )
    (folder / "report.json").write_text(report.model_dump_json())


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    fake = Runs()
    monkeypatch.setattr("slimbridge.study.runs.run_process", fake)
    monkeypatch.setattr("slimbridge.study.runs.get_backend", lambda name: None)
    return fake


BOTH = ("torch", "paddle")


def test_every_combination_runs_on_every_backend_from_one_baseline(runs: Runs, tmp_path: Path) -> None:
    found = run_study(PLAN, VARY, backends=BOTH, output=tmp_path / "s")
    names = ["l1_norm-0.25", "l1_norm-0.5", "l2_norm-0.25", "l2_norm-0.5"]
    assert runs.folders == [f"{name}/{backend}" for name in names for backend in BOTH]
    assert runs.baselines() == [None, *["l1_norm-0.25/torch"] * 7]
    assert [run.folder for run in found.runs] == runs.folders
    assert found.runs[3].values == {IMPORTANCE: "l1_norm", RATIO: 0.5}
    assert [(stage.name, stage.kind, stage.macs) for stage in found.runs[3].stages] == [
        ("00-baseline", "baseline", 10_000),
        ("01-prune", "prune", 2500),
        ("02-finetune", "finetune", 2500),
    ]
    assert read_study(tmp_path / "s" / "study.json") == found
    assert "<html" in (tmp_path / "s" / "report.html").read_text(encoding="utf-8")
    assert load_plan(tmp_path / "s/l2_norm-0.5/plan.yaml").name == "tiny"


def test_each_seed_has_a_baseline_of_its_own(runs: Runs, tmp_path: Path) -> None:
    found = run_study(PLAN, {RATIO: [0.25, 0.5]}, backends=["torch"], output=tmp_path / "s", seeds=(0, 7))
    assert runs.folders == ["0.25-seed0/torch", "0.25-seed7/torch", "0.5-seed0/torch", "0.5-seed7/torch"]
    assert runs.baselines() == [None, None, "0.25-seed0/torch", "0.25-seed7/torch"]
    plan = load_plan(tmp_path / "s/0.5-seed7/plan.yaml")
    assert plan.model is not None
    assert (plan.seed, plan.model.seed) == (7, 7)
    assert [run.seed for run in found.runs] == [0, 7, 0, 7]
    assert {run.combination for run in found.runs} == {"0.25", "0.5"}


def test_what_changes_the_baseline_is_not_shared(runs: Runs, tmp_path: Path) -> None:
    run_study(PLAN, {"baseline.train.epochs": [1, 2]}, backends=BOTH, output=tmp_path / "s")
    assert runs.baselines() == [None, "1/torch", None, "2/torch"]


def test_without_a_trained_baseline_none_is_shared(runs: Runs, tmp_path: Path) -> None:
    run_study({**PLAN, "baseline": {}}, {RATIO: [0.25, 0.5]}, backends=BOTH, output=tmp_path / "s")
    assert runs.baselines() == [None] * 4


def test_seeds_alone_are_a_study(runs: Runs, tmp_path: Path) -> None:
    found = run_study(PLAN, backends=["torch"], output=tmp_path / "s", seeds=(0, 1))
    assert [run.folder for run in found.runs] == ["tiny-seed0/torch", "tiny-seed1/torch"]


def test_a_failed_run_does_not_cost_the_others(runs: Runs, tmp_path: Path) -> None:
    runs.fails = lambda folder: "it broke" if folder.parent.name == "l1_norm-0.25" else None
    found = run_study(PLAN, VARY, backends=BOTH, output=tmp_path / "s")
    assert [(run.folder, run.error) for run in found.failed] == [
        ("l1_norm-0.25/torch", "it broke"),
        ("l1_norm-0.25/paddle", "it broke"),
    ]
    assert sum(len(run.stages) == 3 for run in found.runs) == 6
    assert "l1_norm-0.25/torch: it broke" in str(found)
    assert "l1_norm-0.25/paddle: it broke" in (tmp_path / "s/report.html").read_text(encoding="utf-8")
    runs.asked.clear()
    runs.fails = lambda folder: None
    again = run_study(PLAN, VARY, backends=BOTH, output=tmp_path / "s", resume=True)
    assert runs.folders == ["l1_norm-0.25/torch", "l1_norm-0.25/paddle"]
    assert again.failed == ()
    assert len(again.runs) == 8


def test_a_run_without_a_report_has_failed(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimbridge.study.runs.run_process", lambda arguments, say: None)
    found = run_study(PLAN, VARY, backends=["torch"], output=tmp_path / "s")
    assert {run.error for run in found.runs} == {"left no report"}
    assert "No run is complete" in render_study_html(found)
    assert "4 of 4 runs failed" in str(found)


def test_a_resumed_run_goes_on_with_the_baseline_it_began_with(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "s" / "0.5" / "paddle"
    folder.mkdir(parents=True)
    (folder / "plan.yaml").write_text(json.dumps({**PLAN, "baseline": {"weights": "/elsewhere/x/y/w.safetensors"}}))
    run_study(PLAN, {RATIO: [0.25, 0.5]}, backends=BOTH, output=tmp_path / "s", resume=True)
    assert runs.baselines() == [None, "0.25/torch", "0.25/torch", "elsewhere/x"]


def test_a_killed_study_has_what_was_done(runs: Runs, tmp_path: Path) -> None:
    def killed(folder: Path) -> str | None:
        if folder.parent.name == "l2_norm-0.25":
            raise KeyboardInterrupt
        return None

    runs.fails = killed
    with pytest.raises(KeyboardInterrupt):
        run_study(PLAN, VARY, backends=["torch"], output=tmp_path / "s")
    assert [run.combination for run in read_study(tmp_path / "s/study.json").runs] == ["l1_norm-0.25", "l1_norm-0.5"]
    runs.fails = lambda folder: None
    runs.asked.clear()
    assert len(run_study(PLAN, VARY, backends=["torch"], output=tmp_path / "s", resume=True).runs) == 4
    assert runs.folders == ["l2_norm-0.25/torch", "l2_norm-0.5/torch"]


def test_another_plan_does_not_pass_for_what_is_there(runs: Runs, tmp_path: Path) -> None:
    run_study(PLAN, {RATIO: [0.25, 0.5]}, backends=["torch"], output=tmp_path / "s")
    changed = {**PLAN, "seed": 5}
    found = run_study(changed, {RATIO: [0.25, 0.5]}, backends=["torch"], output=tmp_path / "s", resume=True)
    assert all("holds another plan, from an earlier study" in str(run.error) for run in found.runs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vary": {}}, "nothing to vary"),
        ({"vary": {}, "seeds": (1,)}, "nothing to vary"),
        ({"backends": []}, "backends: none is named"),
        ({"backends": ["torch", "torch"]}, "backends: one is named twice: torch, torch"),
        ({"seeds": (1, 1)}, "seeds: one is named twice: 1, 1"),
        ({"vary": {"seed": [1, 2]}, "seeds": (1, 2)}, "seeds: they are varied by a path too"),
        ({"plan": {**PLAN, "data": None}}, "a study's plan must name its model and its data"),
        ({"plan": {"stages": []}}, "must not be empty"),
    ],
)
def test_a_mistake_runs_nothing(runs: Runs, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    given = {"plan": PLAN, "vary": VARY, "backends": BOTH, "output": tmp_path / "s", **changes}
    with pytest.raises(SlimbridgeError, match=words):
        run_study(**given)
    assert runs.asked == []
    assert not (tmp_path / "s").exists()


def test_an_unknown_backend_is_said_first(tmp_path: Path) -> None:
    with pytest.raises(SlimbridgeError, match=r"did you mean 'torch'\?"):
        run_study(PLAN, VARY, backends=["torhc"], output=tmp_path / "s")


def test_a_folder_that_is_not_empty_is_left_alone(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="exists and is not empty"):
        run_study(PLAN, VARY, backends=BOTH, output=tmp_path)
    with pytest.raises(RunError, match="exists and is not empty"):
        run_study(PLAN, VARY, backends=BOTH, output=tmp_path / "note.txt")
    assert runs.asked == []


# The process


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[str | None, list[str]]]:
    """Runs Python code in place of slimbridge: why it failed, and the lines that it wrote."""

    def call(code: str) -> tuple[str | None, list[str]]:
        said: list[str] = []
        real = run_process.__globals__["subprocess"].Popen

        def started(command: list[str], **rest: Any) -> Any:
            return real([sys.executable, "-c", code, *command[3:]], **rest)

        monkeypatch.setattr("slimbridge.study.process.subprocess.Popen", started)
        return run_process(["an argument"], said.append), said

    return call


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("print('fine')", None),
        (
            "import sys; print('slimbridge: plan: a\\nslimbridge: plan: b', file=sys.stderr); sys.exit(2)",
            "plan: a; plan: b",
        ),
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by signal 9"),
        ("import sys; sys.exit(3)", "ended with exit code 3 and no word"),
    ],
)
def test_why_a_process_failed(program: Any, code: str, why: str | None) -> None:
    assert program(code)[0] == why


def test_what_a_process_writes_is_passed_on(program: Any) -> None:
    code = "import os, sys; print(sys.argv[1]); sys.stderr.write(os.environ['SLIMBRIDGE_CHILD'] + '\\n')"
    assert sorted(program(code)[1]) == ["1", "an argument"]


# The report


def record(combination: str, metrics: Sequence[float], backend: str = "torch", seed: int = 0, **rest: Any) -> StudyRun:
    kinds = ("baseline", "prune", "sparsify", "quantize", "finetune")
    stages = tuple(
        StudyStage(
            name=f"{index:02d}-{kind}",
            kind=kind,  # type: ignore[arg-type]
            metric=metric,
            macs=1_000_000 // (1 + index),
            parameters=1000,
            size_bytes=4000,
            latency_ms=1.0,
        )
        for index, (kind, metric) in enumerate(zip(kinds, metrics, strict=False))
    )
    given = {"values": {IMPORTANCE: combination}, "folder": f"{combination}/{backend}", **rest}
    return StudyRun(combination=combination, backend=backend, seed=seed, stages=stages, **given)


def specs(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="specs">(.*?)</script>', page, re.DOTALL)
    assert found
    loaded: list[dict[str, Any]] = json.loads(found[1])
    return loaded


SCORES = {0: (0.9, 0.5, 0.5, 0.4, 0.8), 1: (0.92, 0.6, 0.6, 0.4, 0.85), 2: (0.97, 0.1, 0.1, 0.1, 0.7)}
SEEDS = Study(
    plan="tiny",
    metric_name="accuracy",
    runs=tuple(record("l1", scores, backend, seed) for backend in BOTH for seed, scores in SCORES.items()),
)


def test_mean_and_spread_are_those_of_the_statistics_module() -> None:
    lines = lines_of(SEEDS)
    assert [(line.backend, len(line.points)) for line in lines] == [("torch", 5), ("paddle", 5)]
    last = [scores[-1] for scores in SCORES.values()]
    figure = lines[0].points[-1].metric
    assert (figure.mean, figure.spread, figure.seeds) == pytest.approx((mean(last), stdev(last), 3), rel=EXACT)
    assert f"{100 * mean(last):.2f} \u00b1 {100 * stdev(last):.2f}" in render_study(SEEDS, 120)
    assert "sample standard deviation" in render_study(SEEDS, 120)


def test_the_curve_has_the_stages_that_change_cost_or_training() -> None:
    plots = specs(render_study_html(SEEDS))
    assert len(plots) == 1
    for plot in plots:
        go.Figure(plot)  # validates every key and value
    torch, paddle = plots[0]["data"]
    assert torch["x"] == [1_000_000, 500_000, 200_000]
    wanted = [100 * mean(scores[index] for scores in SCORES.values()) for index in (0, 1, 4)]
    assert torch["y"] == pytest.approx(wanted, rel=EXACT)
    assert len(torch["error_y"]["array"]) == 3
    assert torch["line"]["dash"] != paddle["line"]["dash"]
    assert torch["meta"] == paddle["meta"]
    assert torch["hovertext"][1].startswith("l1, torch, 01-prune: ")
    assert (torch["name"], paddle["name"]) == ("l1, torch", "l1, paddle")


def test_runs_that_differ_in_numbers_are_joined() -> None:
    amounts = ((0.5, (0.9, 0.6)), (0.25, (0.9, 0.8)))
    runs = [
        record(f"{name}-{ratio}", scores, values={IMPORTANCE: name, RATIO: ratio})
        for name in ("l1", "l2")
        for ratio, scores in amounts
    ]
    shown = Study(plan="tiny", runs=tuple(runs))
    ends = specs(render_study_html(shown))[0]["data"]
    assert [trace["name"] for trace in ends] == ["l1, torch", "l2, torch"]
    assert [sorted(trace["y"]) for trace in ends] == [pytest.approx([60, 80, 90], rel=EXACT)] * 2
    assert ends[0]["x"] == sorted(ends[0]["x"])
    assert ends[0]["meta"] != ends[1]["meta"]


def test_one_seed_has_no_spread() -> None:
    one = Study(plan="tiny", runs=(record("l1", (0.9, 0.5)),))
    assert "\u00b1" not in render_study(one, 120)
    assert "error_y" not in specs(render_study_html(one))[0]["data"][0]


def test_a_metric_that_is_no_share_or_was_lost() -> None:
    shown = Study(
        plan="tiny",
        metric_name="psnr",
        metric_is_share=False,
        runs=(record("a", (31.5, float("nan"))), record("b", (31.5, 28.25)), record("a", (31.0, 30.0), seed=1)),
    )
    text = render_study(shown, 120)
    assert "28.25" in text
    assert "%" not in text
    traces = specs(render_study_html(shown))[0]["data"]
    assert traces[0]["y"] == [31.25, None]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_the_terminal(width: int) -> None:
    assert max(map(len, render_study(SEEDS, width).splitlines())) <= width


def test_hostile_text_stays_text() -> None:
    shown = Study(
        plan=HOSTILE,
        metric_name=HOSTILE,
        runs=(record(HOSTILE, (0.9, 0.5), HOSTILE), record("b", (), error=HOSTILE)),
    )
    page, plain_page = render_study_html(shown), render_study_html(SEEDS)
    assert page.count("<script") == plain_page.count("<script")
    assert "\x1b" not in render_study(shown, 200)


def test_the_page_asks_for_nothing_from_outside() -> None:
    own = re.sub(r"<script>.*?</script>", "", render_study_html(SEEDS), flags=re.DOTALL)
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)", own)
    assert "default-src 'none'" in own
    assert "<title>tiny - slimbridge study</title>" in own


@pytest.mark.parametrize("damage", ["", "[]", '{"plan": 1}', '{"plan": "x", "more": 1}'])
def test_a_damaged_study_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "study.json").write_text(damage)
    with pytest.raises(RunError, match=r"study\.json: not a study"):
        read_study(tmp_path / "study.json")
    with pytest.raises(RunError, match=r"missing\.json: cannot be read"):
        read_study(tmp_path / "missing.json")


def test_a_plan_error_is_of_the_plan() -> None:
    with pytest.raises(PlanError):
        run_study({"stagess": []}, VARY, backends=["torch"], output="nowhere")
