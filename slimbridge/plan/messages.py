"""From pydantic's errors to lines that say where, what was found, what is allowed and the nearest word."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from slimbridge.errors import listed, nearest


def findings(error: ValidationError, root: type[BaseModel], source: str) -> Iterator[str]:
    """One line for each mistake, in the order of the plan.

    Args:
        error: what validating a plan raised.
        root: the class that was validated.
        source: the file's name, or a word for a plan that is no file.
    """
    seen = set()
    items = error.errors(include_url=False)
    for item in items:
        if item["type"] == "too_short" and any(_inside(other, item) for other in items):
            continue  # the list is short only because its items are wrong, which is said already
        types, path = _follow(root, item["loc"])
        line = f"{source}: {path or 'plan'}: {_explain(item, types)}"
        if line not in seen:
            seen.add(line)
            yield line


def _inside(other: Any, item: Any) -> bool:
    """Is one mistake found deeper at the place of another?"""
    place = item["loc"]
    return len(other["loc"]) > len(place) and other["loc"][: len(place)] == place


def _explain(item: Any, holder: list[type[BaseModel]]) -> str:
    found, kind, context = item.get("input"), item["type"], item.get("ctx") or {}
    fields = [name for model in holder for name in model.model_fields]
    last = str(item["loc"][-1]) if item["loc"] else ""
    if kind == "extra_forbidden":
        return f"unknown key '{last}'{nearest(last, fields)}; allowed: {listed(fields)}"
    if kind == "missing":
        return f"is missing; allowed keys here: {listed(fields)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error" and not isinstance(found, str):
        return f"found {found!r}; allowed: {context['expected']}"
    if kind in ("literal_error", "union_tag_invalid"):
        allowed = re.findall(r"'([^']*)'", str(context.get("expected") or context.get("expected_tags")))
        word = str(context.get("tag", found))[:60]
        return f"found '{word}'{nearest(word, allowed)}; allowed: {listed(allowed) if allowed else context['expected']}"
    if kind == "union_tag_not_found":
        return "has no 'kind'; allowed: prune, sparsify, distill, quantize, finetune"
    if kind == "string_pattern_mismatch":
        return f"found '{str(found)[:40]}'; letters, digits, spaces, '_', '-', '.' are allowed, at most 80"
    if kind == "too_short":
        return "must not be empty"
    shown = repr(found)[:60] if not isinstance(found, (dict, list, tuple)) else f"a {type(found).__name__}"
    return f"found {shown}; {item['msg'][0].lower()}{item['msg'][1:]}"


def _follow(root: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[type[BaseModel]], str]:
    """The classes that hold the last key of a location, and the location as a path `stages[0].train.epochs`."""
    holders: list[type[BaseModel]] = []
    current: list[Any] = [root]
    path = ""
    for part in location:
        models = [kind for kind in current if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if isinstance(part, int):
            path += f"[{part}]"
            continue
        named = [model for model in models if part in (model.__name__, _tag(model))]
        # Among several classes the part says which one; "finetune" is a stage's kind and a key of another stage.
        if named and (len(models) > 1 or part not in models[0].model_fields):
            current = list(named)
            continue
        if part.startswith("literal["):
            continue
        if not models and part not in ("", *path.split(".")) and not part.isidentifier():
            continue
        holders = models
        path += f".{part}" if path else part
        current = [inner for model in models if part in model.model_fields for inner in _inner(model, part)]
    return holders, path


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return str(kind.default) if kind is not None else None


def _inner(model: type[BaseModel], name: str) -> list[Any]:
    """The plain types that a field may hold, unions, tuples and annotations opened."""
    opened: list[Any] = []
    waiting = [model.model_fields[name].annotation]
    while waiting:
        kind = waiting.pop(0)
        if get_origin(kind) is None or get_origin(kind) is dict:
            opened.append(kind)
        else:
            waiting.extend(argument for argument in get_args(kind) if argument is not Ellipsis)
    return opened
