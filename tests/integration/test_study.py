"""A whole study on one framework: real processes, one baseline, a failure that is listed, and its resumption."""

from __future__ import annotations

from pathlib import Path

from slimbridge.plan import load_plan
from slimbridge.resolve import with_defaults
from slimbridge.runfolder import RunFolder
from slimbridge.study import run_study
from tests.unit.test_study import PLAN


def test_a_study_on_torch(tmp_path: Path) -> None:
    vary = {"stages[0].ignored_layers": [[], ["features.0"], ["conv9"]]}
    found = run_study(PLAN, vary, backends=["torch"], output=tmp_path / "s")
    whole, partly, failed = found.runs
    assert "ignored_layers: 'conv9' matches none" in str(failed.error)
    assert whole.error is None
    assert partly.error is None
    assert whole.stages[0].metric == partly.stages[0].metric
    assert whole.stages[-1].macs < partly.stages[-1].macs < whole.stages[0].macs
    one, other = (RunFolder(tmp_path / "s" / run.folder) for run in (whole, partly))
    assert one.record("01-prune").input_digest == other.record("01-prune").input_digest
    assert one.record("00-baseline").epochs
    assert not other.record("00-baseline").epochs
    assert one.plan().stages == with_defaults(load_plan(PLAN)).stages
    assert "conv9" in (tmp_path / "s/report.html").read_text(encoding="utf-8")
