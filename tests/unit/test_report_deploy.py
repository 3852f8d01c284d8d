"""How measured exports are shown: in the terminal and in the HTML page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from slimbridge.report.deploy_figures import deployed
from slimbridge.report.deploy_records import Deployment, Exported, Timed
from slimbridge.report.html import render_html
from slimbridge.report.records import Comparison, RunReport
from slimbridge.report.table import render_comparison, render_run
from tests.unit.test_report import BOTH, CHROMIUM, HOSTILE, body, probe, run, specs

ORT, OWN = "onnxruntime 1.32.0", "Paddle Inference 3.3.1"
NOTE = "fc: its input has no grid; it stays in float"


def timed(form: str, of: str, runtime: str, ms: float, **given: Any) -> Timed:
    defaults = {"size_bytes": None, "integer": False, "spread_ms": 0.2, "difference": 0.0, "agreement": None}
    return Timed(form=form, of=of, runtime=runtime, median_ms=ms, **{**defaults, **given})  # type: ignore[arg-type]


EAGER = timed("eager", "baseline", "paddle 3.3.1 eager", 50.0)
FLOAT = timed("onnx", "baseline", ORT, 34.3, size_bytes=46_800_000, agreement=1.0)
INT8 = timed(
    "onnx",
    "compressed",
    ORT,
    10.1,
    size_bytes=12_000_000,
    integer=True,
    agreement=0.984375,
    difference=0.02,
    fused={"conv": (20, 20), "add": (7, 8)},
)
OWN_INT8 = timed("paddle_int8", "compressed", OWN, 16.8, size_bytes=12_000_000, integer=True, agreement=0.97)
OWN_FLOAT = timed("paddle_float", "baseline", OWN, 13.2, size_bytes=46_900_000, agreement=1.0)
EXPORT = Exported(
    form="onnx",
    of="compressed",
    folder="exports/onnx",
    size_bytes=12_000_000,
    integer=True,
    difference=0.02,
    agreement=0.984375,
    samples=64,
    compared_in=ORT,
    notes=(NOTE,),
)


def deployment(*rows: Timed, **given: Any) -> Deployment:
    defaults: dict[str, Any] = {
        "machine": "a machine",
        "processor": "a processor of 2030",
        "threads": 1,
        "rounds": 50,
        "batch": 1,
        "exports": (EXPORT, EXPORT.model_copy(update={"form": "paddle_int8"})),
        "failed": ("onnx of the baseline model in openvino: is not installed",),
    }
    return Deployment(timed=rows, **{**defaults, **given})


ALL = deployment(EAGER, INT8, FLOAT, OWN_INT8, OWN_FLOAT)
SLOWER = "paddle_int8 is SLOWER than the uncompressed float model in Paddle Inference 3.3.1: 16.8 ms against 13.2"
# 50 / 10.1 = 4.950, 34.3 / 10.1 = 3.396, 46.8 / 12 = 3.9
HEADLINE = (
    "int8 in onnxruntime 1.32.0: 4.95x as fast as paddle 3.3.1 eager float32, "
    "3.4x as fast as the uncompressed float model in the same runtime, file 3.9x smaller"
)


def shown(found: Deployment, width: int = 200, **given: Any) -> str:
    return render_run(run("paddle", deployment=found, **given), width)


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_what_is_slower_comes_before_the_best_form_and_that_before_the_table(width: int) -> None:
    whole = shown(ALL, width)
    assert max(map(len, whole.splitlines())) <= width
    text = one_line(whole)
    places = [text.index(part) for part in (f"paddle: {SLOWER}", f"paddle: {HEADLINE}", " agree")]
    assert places == sorted(places)
    for part in ("conv 20/20, add 7/8", NOTE, "not available: onnx of the baseline model in openvino", "64 samples"):
        assert part in text, part
    how = "1 thread, batch 1, median (interquartile range) of 50 rounds in turns, on a processor of 2030"
    assert how in text


def test_each_form_has_its_figures_on_its_line() -> None:
    lines = shown(ALL).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("runtime "))
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[start + 2 :] if "(0.2)" in line]
    assert [row[0] for row in rows] == ["paddle 3.3.1 eager", ORT, "onnx", OWN, "paddle_int8"]
    # 10.1 / 34.3 = 0.294, 10.1 / 50 = 0.202, 12e6 / 2^20 = 11.44; 16.8 / 13.2 = 1.273, 16.8 / 50 = 0.336
    onnx = ["onnx", "compressed", "10.1 (0.2)", "0.29x", "0.20x", "11.4 MiB", "98.44 %", "conv 20/20, add 7/8"]
    assert rows[2] == onnx
    assert rows[4] == ["paddle_int8", "compressed", "16.8 (0.2)", "1.27x", "0.34x", "11.4 MiB", "97.00 %"]
    assert rows[1][1:] == ["onnx", "baseline", "34.3 (0.2)", "0.69x", "44.6 MiB", "100.00 %"]  # 34.3 / 50 = 0.686


def test_slower_is_bold_red_and_within_the_spread_yellow() -> None:
    red = render_comparison(Comparison(runs=(run(deployment=ALL),), verdicts=()), 200, colour=True)
    assert f"\x1b[1;31mtorch: {SLOWER}" in red
    near = deployment(OWN_FLOAT, OWN_INT8.model_copy(update={"median_ms": 13.3}))
    yellow = render_comparison(Comparison(runs=(run(deployment=near),), verdicts=()), 200, colour=True)
    words = "paddle_int8 is no faster than the uncompressed float model in Paddle Inference 3.3.1: 13.3 ms against 13.2"
    assert f"\x1b[1;33mtorch: {words}, less apart than the times vary" in yellow
    assert not deployed(near, "torch").rows[1].slower


def test_a_form_without_float_in_its_runtime_is_held_against_eager() -> None:
    lone = deployment(EAGER, OWN_INT8.model_copy(update={"median_ms": 60.0}))
    (warned,) = deployed(lone, "paddle").warnings
    assert warned.text == f"paddle_int8 in {OWN} is SLOWER than paddle 3.3.1 eager float32: 60.0 ms against 50.0"
    assert (
        deployed(lone, "paddle").headline == f"paddle_int8 in {OWN}: takes 1.2x as long as paddle 3.3.1 eager float32"
    )


def test_only_integer_forms_are_called_slower() -> None:
    pruned = FLOAT.model_copy(update={"of": "compressed", "median_ms": 40.0})
    found = deployment(EAGER, FLOAT, pruned)
    assert found.slower() == ()
    assert found.best() == pruned
    assert found.against_float(INT8) == 10.1 / 34.3
    assert found.against_float(OWN_INT8) is None


def test_an_integer_form_is_the_best_one_also_when_a_float_one_is_faster() -> None:
    fast = FLOAT.model_copy(update={"of": "compressed", "median_ms": 1.0})
    assert deployment(fast, INT8, OWN_INT8).best() == INT8


def test_nothing_is_shown_where_nothing_was_measured() -> None:
    assert "eager float" not in render_comparison(BOTH, 120)
    page = render_html(BOTH)
    assert 'id="deployed"' not in page
    assert "Deployed" not in body(page)
    assert "latency simulated int8 is computed in float here" in body(page)


def test_the_page_has_the_warning_the_headline_and_the_rows() -> None:
    page = render_html(Comparison(runs=(run(), run("paddle", deployment=ALL)), verdicts=()))
    text = body(page)
    assert page.count('id="deployed"') == 1
    # at the top, before the key figures, and again in the section
    assert text.index(f"paddle: {SLOWER}") < text.index("latency, deployed") < text.rindex(SLOWER)
    assert text.rindex(SLOWER) < text.index(HEADLINE[1:])
    assert "onnx compressed 10.1 ms 0.2 0.29x 0.20x 11.4 MiB 98.44 % conv 20/20, add 7/8" in text
    assert "paddle_int8 compressed 16.8 ms 0.2 1.27x slower 0.34x 11.4 MiB 97.00 %" in text
    for part in (NOTE, "not available: onnx of the baseline model in openvino", "a processor of 2030"):
        assert part in text, part


def test_the_key_figure_is_the_measured_one() -> None:
    text = body(render_html(Comparison(runs=(run("paddle", deployment=ALL),), verdicts=())))
    values = "50.0 \u2192 10.1 ms, int8 in onnxruntime 1.32.0 against paddle 3.3.1 eager; 3.4x faster than float there"
    assert f"latency, deployed 4.95x faster {values}" in text
    assert "int8 is computed in float here" not in text
    alone = body(render_html(Comparison(runs=(run(deployment=deployment(INT8, FLOAT)),), verdicts=())))
    assert "int8 is computed in float here" in alone  # no eager baseline was measured


def test_each_run_with_exports_has_its_own_plot_of_times() -> None:
    other = deployment(EAGER, FLOAT, INT8)
    both = Comparison(runs=(run(deployment=ALL), run("paddle", deployment=other)), verdicts=())
    first, second = (plot for plot in specs(render_html(both)) if "width" in plot["data"][0])
    for plot in (first, second):
        go.Figure(plot)
    assert first["data"][0]["x"] == [50.0, 34.3, 10.1, 13.2, 16.8]
    assert first["data"][0]["text"][1:3] == ["34.3  float", "10.1  int8"]
    assert first["layout"]["yaxis"]["ticktext"] == ["paddle 3.3.1 eager", ORT, OWN]
    assert len(set(first["data"][0]["marker"]["opacity"])) == 2
    assert second["data"][0]["x"] == [50.0, 34.3, 10.1]
    assert second["data"][0]["meta"]["series"] == 1


@pytest.mark.parametrize("base", [float("nan"), 0.0, float("inf"), -1.0, 1.7e308])
@pytest.mark.parametrize("ms", [float("nan"), 0.0, float("inf"), 5e-324, 1.7e308])
def test_lost_times_are_shown_without_a_ratio(base: float, ms: float) -> None:
    rows = [row.model_copy(update={"median_ms": base, "spread_ms": ms, "size_bytes": 0}) for row in (EAGER, FLOAT)]
    found = deployment(*rows, INT8.model_copy(update={"median_ms": ms, "spread_ms": base, "size_bytes": 0}))
    assert "onnx" in shown(found)
    assert "Deployed" in body(render_html(Comparison(runs=(run(deployment=found),), verdicts=())))
    assert "nanx" not in shown(found)


def test_a_deployment_without_rows() -> None:
    found = deployment(exports=(), failed=())
    assert "no form of the compressed model was timed" in shown(found)
    assert "No form of the compressed model was timed" in body(
        render_html(Comparison(runs=(run(deployment=found),), verdicts=()))
    )


def hostile() -> RunReport:
    bad = INT8.model_copy(update={"form": HOSTILE, "runtime": HOSTILE, "fused": {HOSTILE: (1, 2)}})
    long = FLOAT.model_copy(update={"form": "f" * 300, "runtime": "r" * 300})
    slow = INT8.model_copy(update={"form": "f" * 300, "runtime": "r" * 300, "median_ms": 99.0})
    noted = EXPORT.model_copy(update={"form": HOSTILE, "notes": (HOSTILE,)})
    found = deployment(EAGER, bad, long, slow, processor=HOSTILE, exports=(noted,), failed=(HOSTILE,))
    return run(deployment=found)


def test_hostile_text_stays_text() -> None:
    comparison = Comparison(runs=(hostile(),), verdicts=())
    page, usual = render_html(comparison), render_html(Comparison(runs=(run(deployment=ALL),), verdicts=()))
    assert page.count("<script") == usual.count("<script")
    assert "<img src=x" not in page
    for width in (60, 100, 200):
        text = render_comparison(comparison, width)
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= width


def test_a_deployment_comes_back_from_a_file() -> None:
    report = run(deployment=ALL)
    assert RunReport.model_validate_json(report.model_dump_json()) == report


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on PATH")
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("given", [run(deployment=ALL), hostile()], ids=["usual", "hostile"])
def test_a_browser_draws_it_within_the_page(given: RunReport, width: int, tmp_path: Path) -> None:
    page = render_html(Comparison(runs=(given, run("paddle", deployment=ALL)), verdicts=()))
    state = probe(page, tmp_path, width)
    assert state["errors"] == []
    assert (state["drawn"], state["failed"]) == (state["plots"], 0)
    assert state["plots"] == len(specs(page))
    assert state["scroll"] == state["client"]
