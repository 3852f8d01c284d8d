"""From a plan and what is varied in it to one plan for each combination."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml

from slimbridge.errors import PlanError, SlimbridgeError
from slimbridge.plan import Plan, make_plan

LONGEST = 60
"""Letters of a combination's name, which is a folder's name too; a longer one is cut and given a digest."""
_PART = re.compile(r"\.?([^.\[\]]+)|\[([^\[\]]+)\]")


@dataclass(frozen=True)
class Combination:
    """A plan with one choice of the varied values.

    Attributes:
        name: made of the values, fit for a folder.
        values: path in the plan -> value.
        plan: with those values.
    """

    name: str
    values: dict[str, Any]
    plan: Plan


def parse_vary(texts: Iterable[str]) -> dict[str, list[Any]]:
    """From `PATH=VALUE,VALUE` to path -> values, written as in a plan's YAML; a list as a value needs its brackets.

    Raises:
        SlimbridgeError: no path, no YAML, or a path that is there twice.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        path, equals, values = text.partition("=")
        path = path.strip()
        if not equals or not path:
            raise SlimbridgeError(f"--vary {text}: found no '='; it is PATH=VALUE,VALUE, e.g. seed=0,1")
        if path in found:
            raise SlimbridgeError(f"--vary {path}: the path is there twice; give all its values at once")
        try:
            found[path] = [_number(value) for value in yaml.safe_load(f"[{values}]")]
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or "it cannot be read"
            raise SlimbridgeError(f"--vary {path}: '{values}' is not a list of YAML values: {problem}") from error
    return found


def parse_seeds(text: str | None) -> tuple[int, ...]:
    """From `0,1,2` to numbers; SlimbridgeError when it is something else."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise SlimbridgeError(f"--seeds {text}: '{wrong[0]}' is no seed; whole numbers with commas are, such as 0,1,2")
    return tuple(int(part) for part in parts)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text, for want of a dot."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def combinations(plan: Plan, vary: Mapping[str, Sequence[Any]]) -> list[Combination]:
    """All combinations of the values, the last path changing fastest.

    Args:
        plan: what stands in it for the varied paths is replaced.
        vary: path -> at least two different values. A path is `stages[0].importance`; a key that has dots in it
            stands in brackets: `stages[0].layer_ratios[layer1.0.conv1]`.

    Raises:
        SlimbridgeError: too few values, or two combinations of one name.
        PlanError: a path leads nowhere, or the plan does not allow a value.
    """
    for path, given in vary.items():
        _check_values(path, given)
    found = []
    for chosen in product(*vary.values()):
        values = dict(zip(vary, chosen, strict=True))
        found.append(Combination(_name(plan, values), values, _with(plan, values)))
    for first, second in zip(sorted(found, key=_by_name), sorted(found, key=_by_name)[1:], strict=False):
        if first.name == second.name:
            raise SlimbridgeError(
                f"--vary: two combinations would have the name '{first.name}': {first.values} and {second.values}"
            )
    return found


def _by_name(combination: Combination) -> str:
    return combination.name


def _check_values(path: str, values: Sequence[Any]) -> None:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise SlimbridgeError(f"--vary {path}: a list of values is needed, found {type(values).__name__}")
    if path in ("name", "backend") or path.startswith(("name.", "backend.")):
        raise SlimbridgeError(f"--vary {path}: backends are chosen by their own option, and names are made")
    if len(values) < 2:
        raise SlimbridgeError(f"--vary {path}: {len(values)} value; at least two are needed, one belongs in the plan")
    for index, value in enumerate(values):
        if any(value == other and type(value) is type(other) for other in values[:index]):
            raise SlimbridgeError(f"--vary {path}: the value {value!r} is there twice")


def _name(plan: Plan, values: Mapping[str, Any]) -> str:
    """E.g. "l1_norm-0.5"; the plan's own name where nothing is varied."""
    texts = [re.sub(r"[^\w.+]+", "_", str(value)).strip("_.") or "none" for value in values.values()]
    name = "-".join(texts) or re.sub(r"[^\w.+]+", "_", plan.name)
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.sha256(repr(values).encode()).hexdigest()[:8]}"


def _with(plan: Plan, values: Mapping[str, Any]) -> Plan:
    """The plan with some of its values replaced; PlanError says which of them it does not allow."""
    content = plan.model_dump()
    for path, value in values.items():
        _put(content, path, value)
    try:
        return make_plan(content, "plan")
    except PlanError as error:
        told = ", ".join(f"{path}={value}" for path, value in values.items())
        raise PlanError(f"--vary {told}: {line.removeprefix('plan: ')}" for line in error.findings) from None


def _put(content: dict[str, Any], path: str, value: Any) -> None:
    parts = _parts(path)
    place: Any = content
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if isinstance(place, (list, tuple)):
            if not part.isdecimal() or int(part) >= len(place):
                raise PlanError(
                    [f"--vary {path}: '{part}' is none of the {len(place)} places of the list, 0 the first"]
                )
            key: Any = int(part)
        elif isinstance(place, dict):
            key = part
        else:
            raise PlanError([f"--vary {path}: nothing can stand below '{parts[index - 1]}', which is {place!r}"])
        if last:
            place[key] = value
            return
        inner = place[key] if isinstance(place, list) else place.get(key)
        # A tuple is opened for change; a section that the plan leaves out is begun.
        place[key] = list(inner) if isinstance(inner, tuple) else {} if inner is None else deepcopy(inner)
        place = place[key]


def _parts(path: str) -> list[str]:
    """`stages[0].importance` -> stages, 0, importance."""
    parts = [first or second for first, second in _PART.findall(path)]
    if not parts or "".join(match.group() for match in _PART.finditer(path)) != path or path.startswith((".", "[")):
        raise PlanError([f"--vary {path}: not a path in a plan, such as stages[0].importance"])
    return parts
