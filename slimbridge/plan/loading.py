"""Plans from shipped names, YAML files, dicts; and back to YAML with every default written out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from slimbridge.errors import PlanError, listed, nearest
from slimbridge.plan.messages import findings
from slimbridge.plan.schema import Plan

LARGEST = 1_000_000
"""Bytes of a plan file; a larger one is refused unread."""
MOST_VALUES = 10_000
"""Values in a plan, aliases written out; a file of a few lines can stand for billions."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int)) and key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key '{key}' stands twice")
            seen.add(key if isinstance(key, (str, int)) else id(key_node))
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1e-3 as text, for want of a dot; nobody means that.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def shipped_plans() -> tuple[str, ...]:
    """Names of the plans in the package, sorted."""
    folder = files("slimbridge.plan") / "shipped"
    return tuple(sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".yaml")))


def load_plan(source: str | Path | Mapping[str, Any] | Plan) -> Plan:
    """A plan from a shipped name, a path, a mapping, or a plan itself.

    Raises:
        PlanError: no such plan, unreadable, or mistakes in it: one finding for each.
    """
    if isinstance(source, Plan):
        return source
    if isinstance(source, Mapping):
        return make_plan(source, "plan")
    name = str(source)
    if name in shipped_plans():
        text = (files("slimbridge.plan") / "shipped" / f"{name}.yaml").read_text(encoding="utf-8")
        return make_plan(_parse(text, name), name)
    path = Path(source)
    if not path.is_file():
        known = shipped_plans()
        raise PlanError(
            [f"no plan '{name}': neither a file nor shipped{nearest(name, known)}; shipped: {listed(known)}"]
        )
    return make_plan(_parse(_read(path), str(path)), str(path))


def make_plan(values: Any, source: str) -> Plan:
    """Validate; PlanError holds every mistake at once."""
    if not isinstance(values, Mapping):
        raise PlanError([f"{source}: a plan is a mapping of keys; found {type(values).__name__}"])
    try:
        return Plan.model_validate(dict(values))
    except ValidationError as error:
        raise PlanError(findings(error, Plan, source)) from None


def plan_to_yaml(plan: Plan) -> str:
    """YAML text with every value, defaults included, in the schema's order."""
    return yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST:
            raise PlanError([f"{path}: {path.stat().st_size} bytes; a plan has at most {LARGEST}"])
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlanError([f"{path}: not a text file (byte {error.start})"]) from error
    except OSError as error:
        raise PlanError([f"{path}: cannot be read: {error.strerror or error}"]) from error


def _parse(text: str, source: str) -> Any:
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0] or type(error).__name__
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise PlanError([f"{source}: {line}not valid YAML: {problem}"]) from error
    if _count(values) > MOST_VALUES:
        raise PlanError([f"{source}: holds more than {MOST_VALUES} values with its aliases written out"])
    return values


def _count(values: Any) -> int:
    """Values of a nested structure, shared ones counted each time; counting stops above MOST_VALUES."""
    waiting, count = [values], 0
    while waiting and count <= MOST_VALUES:
        item = waiting.pop()
        count += 1
        if isinstance(item, (dict, list)):
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return count
