"""The README's generated tables: what is supported, and every key of a plan with its default."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from slimbridge.errors import RunError
from slimbridge.files import write_file


def support_table() -> str:
    """Markdown: everything that a plan may name, and where it comes from."""
    lines = ["| sort | name | what it is |", "|---|---|---|"]
    lines += [f"| {sort} | `{name}` | {text} |" for sort, name, text in _rows()]
    return "\n".join(lines)


def plan_reference() -> str:
    """Markdown: each section of a plan, its keys, their defaults and meaning, from the schema itself."""
    from slimbridge.plan import schema

    blocks = []
    for title, section in _SECTIONS.items():
        model = getattr(schema, section)
        meanings = _attributes(model.__doc__ or "")
        blocks.append(f"**{title}** - {_first_sentence(model)}.\n\n| key | default | meaning |\n|---|---|---|")
        for name, item in model.model_fields.items():
            default = "required" if item.is_required() else f"`{_shown(item.default)}`"
            blocks[-1] += f"\n| `{name}` | {default} | {meanings.get(name, '')} |"
    return "\n\n".join(blocks)


def updated(text: str) -> str:
    """The text with the tables between their marks made anew; RunError when a mark is missing."""
    for name, make in (("supported", support_table), ("plan", plan_reference)):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in text or end not in text:
            raise RunError(f"the text has no marks '{begin}' and '{end}'")
        before, rest = text.split(begin, 1)
        text = f"{before}{begin}\n{make()}\n{end}{rest.split(end, 1)[1]}"
    return text


_SECTIONS = {
    "the plan": "Plan",
    "model": "ModelSection",
    "data": "DataSection",
    "baseline": "BaselineSection",
    "train, finetune": "TrainSection",
    "optimizer": "OptimizerSection",
    "stage prune": "PruneStage",
    "target": "TargetSection",
    "sensitivity": "SensitivitySection",
    "preparation": "PreparationSection",
    "native": "NativeSection",
    "stage sparsify": "SparsifyStage",
    "gmp": "GmpSection",
    "stage distill": "DistillStage",
    "teacher": "TeacherSection",
    "losses": "LossSection",
    "stage quantize": "QuantizeStage",
    "qat": "QatSection",
    "native, of quantize": "NativeQuantizeSection",
    "stage finetune": "FinetuneStage",
}


def _attributes(text: str) -> dict[str, str]:
    """Name -> meaning, from the lines under "Attributes:" of a docstring."""
    lines = text.partition("Attributes:")[2].splitlines()
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        start = re.match(r" {8}(\w[\w, ]*): (.*)", line)
        if start:
            names = [name.strip() for name in start[1].split(",")]
            found.update(dict.fromkeys(names, start[2]))
        elif line.strip():
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found


def _shown(default: Any) -> str:
    if isinstance(default, BaseModel):
        return "see below"
    return "[]" if default == () else str(default)


def _rows() -> Iterator[tuple[str, str, str]]:
    from slimbridge import zoo
    from slimbridge.discovery import backend_names
    from slimbridge.plan import shipped_plans
    from slimbridge.tasks import DATA_SETS, metrics

    for name in backend_names():
        yield "backend", name, f"`pip install 'slimbridge[{name}]'`"
    yield from _registered()
    for name, entry in zoo.models().items():
        yield "zoo model", name, f"{entry.doc} ({entry.paper.rsplit(',', 1)[-1].strip()})"
    for name, load in DATA_SETS.items():
        yield "data", name, _first_sentence(load)
    for name, metric in metrics.METRICS.items():
        yield "metric", name, _first_sentence(metric)
    for name in shipped_plans():
        yield "plan", name, "shipped"


def _registered() -> Iterator[tuple[str, str, str]]:
    from slimbridge.plan import registries

    for name in registries.IMPORTANCES.names():
        criterion = registries.as_importance(registries.IMPORTANCES.get(name))
        yield "importance of channels", name, _first_sentence(criterion.score) + _from(criterion.source)
    for name in registries.ENTRY_IMPORTANCES.names():
        single = registries.ENTRY_IMPORTANCES.get(name)
        yield "importance of entries", name, _first_sentence(single.score) + _from(single.source)
    for name in registries.OBSERVERS.names():
        yield "observer", name, _first_sentence(registries.OBSERVERS.get(name))
    for name in registries.LOSSES.names():
        loss = registries.LOSSES.get(name)
        yield "loss", name, f"{_first_sentence(loss.function)} ({loss.source})"
    for name in registries.SCHEDULES.names():
        yield "schedule", name, _first_sentence(registries.SCHEDULES.get(name))


def _from(source: str) -> str:
    return f" ({source})" if source else ""


def _first_sentence(thing: Any) -> str:
    paragraph = " ".join((thing.__doc__ or "").strip().split("\n\n")[0].split())
    return paragraph.rstrip(".").replace("|", "\\|")


def main() -> None:
    """Rewrite the table of the file that is named."""
    path = Path(sys.argv[1])
    write_file(path, updated(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
