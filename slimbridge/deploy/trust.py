"""When the outputs of an exported file count as those of the model."""

from __future__ import annotations

from slimbridge.parity.tolerances import tolerance

_WIDER = {"export": "export_classes", "export_runtime": "export_runtime_classes"}


def objection(difference: float, agreement: float | None, row: str) -> str | None:
    """Why a file's outputs are not trusted, in one sentence; None when they are.

    They are within the row's tolerance; or, where a model classifies, nearly all its samples keep their class and the
    outputs are within a wider row.

    Args:
        difference: relative L2 difference of all outputs.
        agreement: share of the samples with the same largest output; None where that says nothing.
        row: of the table of tolerances, "export" or "export_runtime".
    """
    strict, wide, least = tolerance(row), tolerance(_WIDER[row]), 1 - tolerance("export_agreement").value
    same = agreement is not None and agreement >= least
    if difference <= (wide if same else strict).value:
        return None
    allowed = f"{strict.value:g} is allowed, {wide.value:g} where {least:.0%} of the samples keep their largest output"
    kept = "" if agreement is None else f"; here {agreement:.1%} keep it"
    return f"its outputs differ from the model's by {difference:.3g} ({strict.unit}), {allowed}{kept}"
