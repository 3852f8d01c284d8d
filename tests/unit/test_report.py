"""The tables and the HTML page of a report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from slimbridge.curves import GroupCurve, Sensitivity
from slimbridge.errors import RunError
from slimbridge.report.figures import count, duration, parity_sentence, size, verdict_word
from slimbridge.report.html import render_html, write_html
from slimbridge.report.records import Comparison, EpochRecord, LatencyRecord, RunReport, StageRecord, Verdict
from slimbridge.report.study_html import render_study_html
from slimbridge.report.table import render_comparison, render_run
from tests.unit.test_study import SEEDS

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>{{ 7*7 }} [red]\x1b[31m"
STAGES: tuple[dict[str, Any], ...] = (
    {"kind": "baseline", "name": "00-baseline", "metric": 0.9956, "size_bytes": 235_233, "epochs": (2.0, 1.0, 0.5)},
    {
        "kind": "prune",
        "name": "01-prune",
        "metric": 0.9911,
        "metric_before_training": 0.3111,
        "parameters": 28_123,
        "macs": 512_300,
        "size_bytes": 118_233,
        "epochs": (0.7, 0.4),
        "notes": ("conv1 was left alone",),
    },
    {
        "kind": "quantize",
        "name": "02-quantize",
        "metric": 0.9933,
        "parameters": 28_123,
        "macs": 512_300,
        "size_bytes": 34_233,
        "notes": ("quantization is simulated",),
    },
)


def stage(index: int, latency: tuple[float, str], **given: Any) -> StageRecord:
    losses = given.pop("epochs", ())
    epochs = tuple(
        EpochRecord(epoch=n + 1, terms={"cross_entropy": loss, "kd": loss}, learning_rate=0.1, seconds=0.4)
        for n, loss in enumerate(losses)
    )
    timed = LatencyRecord(median_ms=latency[0], spread_ms=0.02, runs=50, batch=1, threads=1, how=latency[1])
    defaults = {"parameters": 57_354, "macs": 1_231_232, "seconds": 8.1, "input_digest": "ab" * 32}
    return StageRecord(index=index, latency=timed, epochs=epochs, **{**defaults, **given})


def run(backend: str = "torch", base_ms: float = 0.4, plan: str = "digits", **given: Any) -> RunReport:
    latencies = [(base_ms, "eager, float32"), (0.75 * base_ms, "eager, float32"), (9.0, "eager, simulated int8")]
    stages = tuple(stage(i, latencies[i], **fields) for i, fields in enumerate(STAGES))
    defaults: dict[str, Any] = {
        "versions": {backend: "9.8.7"},
        "machine": "a processor, 2 cores",
        "device": "cpu",
        "metric_name": "accuracy",
        "stages": stages,
    }
    return RunReport(plan=plan, backend=backend, **{**defaults, **given})


def verdict(passed: bool | None, figure: float | None, parity: str = "exact", reason: str = "a reason") -> Verdict:
    return Verdict(
        stage="01-prune",
        parity=parity,  # type: ignore[arg-type]
        claim="kept channels",
        figure=figure,
        tolerance=0.01,
        unit="share",
        passed=passed,
        reason=reason,
    )


VERDICTS = (
    verdict(True, 0.0),
    verdict(True, 0.004, "numeric"),
    verdict(False, 0.25, reason="why it may not"),
    verdict(None, None, reason="the weights had diverged"),
)
BOTH = Comparison(runs=(run(), run("paddle", 2.0)), verdicts=VERDICTS)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (57_354, "57.4 k"), (999_600, "1.00 M"), (10**9, "1.00 G")],
)
def test_counts_have_three_digits_and_a_decimal_unit(value: int, text: str) -> None:
    assert count(value) == text


def test_sizes_are_binary_and_times_change_their_unit() -> None:
    sizes = [size(n) for n in (0, 1023, 1024, 235_233, 3 * 2**20)]
    assert sizes == ["0 B", "1023 B", "1.00 KiB", "230 KiB", "3.00 MiB"]
    assert [duration(s) for s in (0.04, 8.1, 131, 7200)] == ["0.0 s", "8.1 s", "2.2 min", "2.0 h"]


@pytest.mark.parametrize("width", [80, 120])
def test_every_figure_of_a_run_is_on_its_line_of_the_table(width: int) -> None:
    text = render_comparison(BOTH, width)
    assert max(map(len, text.splitlines())) <= width
    words = next(line for line in text.splitlines() if line.startswith("01-prune ")).split()
    # 28,123 and 512,300 entries; 118,233 / 1024 = 115.5 KiB; 0.75 of the baseline's 0.4 ms
    numbers = [float(word) for word in re.findall(r"\d+\.\d+|\d+", " ".join(words[1:]).replace("k", ""))]
    wanted = [99.11, 31.11, 28.1, 512, 115, 0.3, 0.75, 8.1]
    assert [number for number in numbers if number in wanted] == wanted
    if width == 120:
        assert {0.49, 0.42, 0.50} <= set(numbers)  # 28123/57354, 512300/1231232, 118233/235233


def test_a_simulated_stage_has_no_latency_ratio() -> None:
    lines = [line for line in render_comparison(BOTH, 80).splitlines() if line.startswith("02-quantize ")]
    assert len(lines) == 2
    assert all("simulated" in line and "x" not in line.split("KiB")[1] for line in lines)
    assert "Latency ratios are to the same backend's baseline" in render_run(run(), 120)


def test_a_note_of_both_runs_is_written_once_with_its_stage() -> None:
    text = render_comparison(BOTH, 120)
    assert text.count("conv1 was left alone") == 1
    assert "01-prune (torch, paddle): conv1 was left alone" in text
    assert "01-prune: conv1 was left alone" in str(run())


def test_verdicts_are_words_and_those_that_did_not_pass_have_their_reason() -> None:
    assert [verdict_word(v) for v in VERDICTS] == ["equal", "within", "differs", "not compared"]
    for width in (80, 120):
        text = " ".join(render_comparison(BOTH, width).split())
        assert "parity: 1 of 3 claims differs: 1 equal, 1 within tolerance, 1 not compared" in text
        assert "DIFFERS 01-prune, kept channels: why it may not" in text
        assert "not compared 01-prune, kept channels: the weights had diverged" in text
        assert "a reason" not in text


def test_the_sentence_never_calls_it_equal_when_something_was_left_out() -> None:
    assert parity_sentence(VERDICTS[:1] * 2) == "All 2 claims equal"
    assert parity_sentence(VERDICTS[:2]) == "2 of 2 claims hold: 1 equal, 1 within tolerance"
    assert "not compared" in parity_sentence((VERDICTS[0], VERDICTS[3]))
    assert parity_sentence(VERDICTS[3:]).startswith("Nothing was compared")
    assert verdict_word(verdict(True, 0.0, "behavioural")) == "equal"
    assert verdict_word(verdict(True, None, "numeric")) == "within"


def test_colour_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in render_comparison(BOTH, 80)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[1;31m" in render_comparison(BOTH, 80, colour=True)


def test_a_name_cannot_steer_the_terminal() -> None:
    text = render_run(run(plan=HOSTILE), 300)
    assert "\x1b" not in text
    assert "[red]" in text


def test_two_runs_on_one_backend_are_told_apart() -> None:
    text = render_comparison(Comparison(runs=(run(), run()), verdicts=()), 120)
    assert "torch #1" in text
    assert "torch #2" in text


@pytest.mark.parametrize("render", [render_comparison, render_html])
def test_no_run_is_an_error(render: Any) -> None:
    with pytest.raises(RunError, match="at least one run"):
        render(Comparison(runs=(), verdicts=()))


def body(page: str) -> str:
    """The page's own words, without scripts and styles."""
    text = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


def specs(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="specs">(.*?)</script>', page, re.DOTALL)
    assert found
    loaded: list[dict[str, Any]] = json.loads(found[1])
    return loaded


def test_the_page_holds_the_figures() -> None:
    text = body(render_html(BOTH))
    assert "1 of 3 claims differs" in text
    # 99.56 -> 99.33 %, 235233/34233 = 6.87, 1231232/512300 = 2.40
    changes = ("\u22120.23 points", "6.87x smaller", "2.4x fewer")
    for figure in (*changes, "99.11", "31.11", "0.75x", "9.8.7", "a processor"):
        assert figure in text, figure
    for word in ("equal", "within", "differs", "not compared", "exact", "numeric", "behavioural", "why it may not"):
        assert word in text, word


def test_the_plots_hold_the_figures_and_are_valid_to_plotly() -> None:
    plots = specs(render_html(BOTH))
    for plot in plots:
        go.Figure(plot)  # validates every key and value
    metric = plots[0]["data"][0]
    assert metric["y"] == pytest.approx([99.56, 99.11, 99.33])
    losses = [trace["y"] for plot in plots for trace in plot["data"] if trace["x"] == [1, 2, 3]]
    assert losses == [[4.0, 2.0, 1.0]] * 2  # the total of two equal terms, on both backends
    bars = [plot["data"][0]["x"] for plot in plots if plot["data"][0]["type"] == "bar"]
    assert bars[0] == pytest.approx([1, 28_123 / 57_354, 28_123 / 57_354])
    assert bars[3] == pytest.approx([1, 0.75, 0])


def test_the_page_asks_for_nothing_from_outside() -> None:
    page = render_html(BOTH)
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)", own)
    assert "default-src 'none'" in own


def hostile() -> Comparison:
    bad = run(backend=HOSTILE, plan=HOSTILE, machine=HOSTILE, metric_name=HOSTILE, versions={HOSTILE: HOSTILE})
    curve = GroupCurve(layers=(HOSTILE,), channels=8, points={0.5: 0.5})
    curves = CURVES.model_copy(update={"importance": HOSTILE, "curves": (curve,)})
    more = {"sensitivity": curves, "zeros": {HOSTILE: (1, 2)}}
    named = bad.stages[1].model_copy(update={"name": HOSTILE, "notes": (HOSTILE,), **more})
    bad = bad.model_copy(update={"stages": (bad.stages[0], named, bad.stages[2])})
    claim = verdict(False, 1.0, reason=HOSTILE).model_copy(update={"stage": HOSTILE, "claim": HOSTILE, "unit": HOSTILE})
    return Comparison(runs=(bad, bad), verdicts=(claim,))


def test_hostile_text_stays_text() -> None:
    page = render_html(hostile())
    plain_page = render_html(Comparison(runs=(run(), run()), verdicts=(verdict(False, 1.0),)))
    assert page.count("<script") == plain_page.count("<script")
    assert page.count("</script") == plain_page.count("</script")
    assert "<img src=x" not in page
    assert "49" not in body(page).split("{{ 7*7 }}")[0]
    ticks = specs(page)[0]["layout"]["xaxis"]["ticktext"]
    assert ticks[1].startswith("&lt;/script&gt;")


CURVES = Sensitivity(
    importance="l1_norm",
    metric=0.99,
    samples=450,
    weights_digest="",
    definition="",
    curves=(
        GroupCurve(layers=("conv1",), channels=16, points={0.5: 0.71, 0.25: 0.87}),
        GroupCurve(layers=("conv2", "conv3", "conv4"), channels=32, points={0.25: 0.93}),
    ),
)
ZEROS = {"conv1.weight": (10, 40), "fc.weight": (90, 120)}


def pruned(backend: str = "torch") -> RunReport:
    """A run whose stage 1 measured curves and whose stage 2 masks."""
    whole = run(backend)
    first, second, third = whole.stages
    second = second.model_copy(update={"sensitivity": CURVES})
    note = "masks save neither time nor memory"
    third = third.model_copy(update={"kind": "sparsify", "name": "02-sparsify", "zeros": ZEROS, "notes": (note,)})
    return whole.model_copy(update={"stages": (first, second, third)})


def test_each_channel_group_has_its_curve_on_one_scale() -> None:
    page = render_html(Comparison(runs=(pruned(), run("paddle")), verdicts=()))
    plots = specs(page)[-2:]
    for plot in plots:
        go.Figure(plot)
    assert [plot["data"][0]["x"] for plot in plots] == [[0, 25, 50], [0, 25]]
    assert [plot["data"][0]["y"] for plot in plots] == [pytest.approx([99, 87, 71]), pytest.approx([99, 93])]
    assert plots[0]["layout"]["yaxis"]["range"] == plots[1]["layout"]["yaxis"]["range"]
    text = body(page)
    assert "conv2, conv3, ... 1 more" in text
    assert "01-prune, 32 channels" in text
    assert "channels in order of l1_norm, 450 test samples, 99.00 % unpruned" in text
    assert "conv1 16 87.00 71.00 conv2, conv3, conv4 32 93.00" in text


def test_without_curves_there_is_no_section_for_them() -> None:
    page = body(render_html(BOTH))
    assert "Sensitivity" not in page
    assert "Zeros by layer" not in page


def test_zeros_of_each_masked_layer_are_bars() -> None:
    page = render_html(Comparison(runs=(pruned(), pruned("paddle")), verdicts=()))
    (plot,) = [plot for plot in specs(page) if plot["layout"]["yaxis"].get("ticktext") == ["conv1", "fc"]]
    go.Figure(plot)
    assert [trace["x"] for trace in plot["data"]] == [[25, 75]] * 2
    assert plot["data"][1]["hovertext"] == ["paddle, conv1.weight: 10 of 40", "paddle, fc.weight: 90 of 120"]
    text = body(page)
    assert "torch: 62.50 % of 160 masked entries are zero" in text  # 100 / 160
    assert "masks save neither time nor memory" in text


def test_curves_and_zeros_come_back_from_a_file() -> None:
    assert RunReport.model_validate_json(pruned().model_dump_json()) == pruned()


def test_a_run_without_training_and_with_a_lost_metric() -> None:
    alone = stage(0, (0.4, "eager"), kind="baseline", name="00-baseline", metric=float("nan"), size_bytes=0)
    after = stage(1, (0.4, "eager"), kind="prune", name="01-prune", metric=0.5, size_bytes=0)
    comparison = Comparison(runs=(run(stages=(alone, after)),), verdicts=())
    page = render_html(comparison)
    assert "Training loss" not in body(page)
    assert "nothing to compare it with" in body(page)
    assert specs(page)[0]["data"][0]["y"] == [None, 50.0]
    assert "no ratio" in body(page)
    assert "nan" in str(comparison)


def test_a_run_without_any_stage() -> None:
    comparison = Comparison(runs=(run(stages=()),), verdicts=())
    assert "no stage" in str(comparison)
    assert "no stage" in body(render_html(comparison))


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_html(path, BOTH)
    assert path.read_text(encoding="utf-8") == render_html(BOTH)
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"report\.html: cannot be written: No such file or directory$"):
        write_html(tmp_path / "nowhere" / "report.html", BOTH)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        write_html(path, BOTH)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


PROBE = """<script>
window.seen = [];
addEventListener("error", function (event) { seen.push(event.message); });
addEventListener("securitypolicyviolation", function (event) { seen.push(event.violatedDirective); });
addEventListener("load", function () {
  setTimeout(function () {
    const root = document.documentElement;
    const plots = [...document.querySelectorAll(".plot")];
    const drawn = plots.filter(function (plot) { return plot.querySelector("svg.main-svg path"); });
    const themes = [0, 1, 2].map(function () {  // light, dark, auto
      document.getElementById("theme").click();
      const line = document.querySelector(".plot path.js-line");
      return [root.dataset.theme || "auto", getComputedStyle(document.body).backgroundColor, line.style.stroke];
    });
    parent.postMessage(JSON.stringify({
      errors: seen, plots: plots.length, drawn: drawn.length, title: document.title,
      failed: document.querySelectorAll(".failed").length, inner: innerWidth,
      scroll: root.scrollWidth, client: root.clientWidth, themes: themes
    }), "*");
  }, 500);
});
</script>"""
# A window cannot be narrower than 500 pixels; a frame can.
FRAME = """<script>
addEventListener("message", function (event) { document.body.textContent = "PROBE" + event.data + "PROBE"; });
</script><body><iframe src="page.html" style="width: %dpx; height: 900px"></iframe></body>"""


def probe(page: str, folder: Path, width: int) -> dict[str, Any]:
    """What a browser made of the page in a frame of that width."""
    assert CHROMIUM
    path = folder / "frame.html"
    path.write_text(FRAME % width, encoding="utf-8")
    (folder / "page.html").write_text(page.replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
    switches = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = [CHROMIUM, *switches.split(), f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000"]
    command += ["--virtual-time-budget=5000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<body[^>]*>PROBE(.*)PROBE", done.stdout)
    assert found, done.stderr[-2000:]
    state: dict[str, Any] = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return state


PAGES: dict[str, Callable[[], str]] = {
    "usual": lambda: render_html(BOTH),
    "hostile": lambda: render_html(hostile()),
    "pruned": lambda: render_html(Comparison(runs=(pruned(), pruned("paddle")), verdicts=())),
    "study": lambda: render_study_html(SEEDS),
}


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on PATH")
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", ["usual", "hostile", "pruned", "study"])
def test_a_browser_draws_every_plot(name: str, width: int, tmp_path: Path) -> None:
    page = PAGES[name]()
    state = probe(page, tmp_path, width)
    assert state["errors"] == []
    assert (state["drawn"], state["failed"]) == (state["plots"], 0)
    assert state["plots"] == len(specs(page))
    assert state["inner"] == width
    assert state["scroll"] == state["client"]
    light, dark, _ = state["themes"]
    assert light == ["light", "rgb(246, 247, 249)", "rgb(31, 111, 214)"]
    assert dark == ["dark", "rgb(15, 19, 24)", "rgb(108, 176, 255)"]
    assert state["title"].endswith("slimbridge study" if name == "study" else "slimbridge report")
