"""When an exported file is trusted."""

from __future__ import annotations

import pytest

from slimbridge.deploy.trust import objection


@pytest.mark.parametrize(
    ("difference", "agreement", "row", "trusted"),
    [
        (0.0, None, "export", True),
        (0.01, None, "export", True),
        (0.011, None, "export", False),  # nothing else speaks for it
        (0.011, 0.9, "export", False),
        (0.011, 1.0, "export", True),
        (0.011, 0.99, "export", True),
        (0.06, 1.0, "export", False),
        (0.06, 1.0, "export_runtime", True),
        (0.06, 0.98, "export_runtime", False),
        (0.04, 0.5, "export_runtime", True),  # random weights: classes mean nothing
        (0.3, 1.0, "export_runtime", False),
        (float("nan"), 1.0, "export", False),
        (float("inf"), 1.0, "export_runtime", False),
    ],
)
def test_trust(difference: float, agreement: float | None, row: str, trusted: bool) -> None:
    found = objection(difference, agreement, row)
    assert (found is None) == trusted
    if found is not None:
        assert f"{difference:.3g}" in found
