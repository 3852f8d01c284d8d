"""Which units go: count rules, selection, limits."""

from __future__ import annotations

from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from math import floor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimbridge.graph import ChannelGroup, UnitProducer
from slimbridge.plan import PruneStage
from slimbridge.ports import Array
from slimbridge.prune.presets import Definition
from slimbridge.prune.select import ROUNDING, Amount, choose, last_of_each_layer, remove_count

RULES = ("round", "ceil_kept")


def definition(**stage: Any) -> Definition:
    return Definition.of(PruneStage(pruning_ratio=0.5, **stage))


def group(*units: range | list[int], of: range | None = None) -> ChannelGroup:
    """Layers that make these units, "0", "1", ...; the group's units are those of all, or `of`."""
    made = [UnitProducer(str(i), "conv", f"{i}.weight", np.array(list(u), np.int64)) for i, u in enumerate(units)]
    everything = np.unique(np.concatenate([producer.units for producer in made]))
    return ChannelGroup(tuple(made), everything if of is None else np.array(list(of), np.int64))


def chosen(values: list[list[float]], amounts: list[Amount], structures: Any = (), **stage: Any) -> list[list[int]]:
    """Of groups of one layer each."""
    groups = [group(range(len(own))) for own in values]
    arrays = [np.array(own, np.float64) for own in values]
    return [found.tolist() for found in choose(groups, arrays, amounts, definition(**stage), structures)]


def local(values: list[float], ratio: float, before: int | None = None, **stage: Any) -> list[int]:
    return chosen([values], [Amount(ratio, before or len(values))], **stage)[0]


# Counting


def test_counts_by_decimal_arithmetic() -> None:
    """On the products that floating point gives, for all n to 64 and many ratios."""
    for n in range(1, 65):
        for ratio in (k / 40 for k in range(1, 40)):
            share = int(Decimal(n * ratio).quantize(Decimal(1), rounding=ROUND_HALF_EVEN))
            stays = int(Decimal(n * (1 - ratio)).quantize(Decimal(1), rounding=ROUND_FLOOR))
            assert remove_count(n, ratio) == min(n - 1, share), (n, ratio)
            assert remove_count(n, ratio, "ceil_kept") == min(n - 1, n - stays), (n, ratio)


@pytest.mark.parametrize("rule", RULES)
@given(st.integers(1, 2048), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_one_channel_always_stays_and_more_is_never_less(rule: str, n: int, ratio: float, other: float) -> None:
    assert 0 <= remove_count(n, ratio, rule) <= n - 1
    low, high = sorted((ratio, other))
    assert remove_count(n, low, rule) <= remove_count(n, high, rule)


# One group

TIES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=30)


@given(TIES, st.floats(0.01, 0.99), st.sampled_from(RULES))
def test_the_smallest_go_and_ties_go_by_index(values: list[float], ratio: float, rule: Any) -> None:
    count = remove_count(len(values), ratio, rule)
    expected = sorted(sorted(range(len(values)), key=lambda index: (values[index], index))[:count])
    assert local(values, ratio, count_rule=rule) == expected


@given(TIES, st.floats(0, 0.99), st.integers(1, 9), st.integers(1, 9), st.integers(0, 20), st.floats(0.01, 0.99))
def test_limits(values: list[float], ratio: float, multiple: int, least: int, gone: int, most: float) -> None:
    n, before = len(values), len(values) + gone
    found = local(values, ratio, before, round_to=multiple, min_channels=least, max_ratio=most)
    stays = n - len(found)
    assert stays >= min(n, least)
    assert stays == n or stays % multiple == 0
    largest = floor(before * most + ROUNDING)  # no group goes above max_ratio, so its share is rounded down
    assert not found or before - stays <= largest
    wanted = max(0, remove_count(before, ratio) - gone) if ratio else 0
    assert len(found) <= wanted
    assert wanted - len(found) < multiple or stays < max(least, before - largest, 1) + multiple


@pytest.mark.parametrize(
    ("n", "before", "ratio", "stage", "expected"),
    [
        (10, 10, 0.5, {}, 5),
        (8, 10, 0.5, {}, 3),  # two of the five have gone before
        (4, 10, 0.5, {}, 0),  # more than that have gone
        (10, 10, 0.5, {"round_to": 4}, 2),
        (10, 10, 0.5, {"round_to": 16}, 0),
        (10, 10, 0.9, {"min_channels": 4}, 6),
        (10, 10, 0.9, {"min_channels": 12}, 0),
        (10, 10, 0.9, {"max_ratio": 0.3}, 3),
        (8, 10, 0.9, {"max_ratio": 0.3}, 1),
        (10, 10, 0.9, {"max_ratio": 0.7, "min_channels": 2, "round_to": 2}, 6),
        (10, 10, 0.99, {}, 9),
        (10, 10, 0.25, {}, 2),
        (10, 10, 0.25, {"count_rule": "ceil_kept"}, 3),
        (10, 10, 0.25, {"preset": "torch_pruning"}, 3),
        (10, 10, 0.0, {}, 0),
    ],
)
def test_how_many_go(n: int, before: int, ratio: float, stage: dict[str, Any], expected: int) -> None:
    assert local([float(n - index) for index in range(n)], ratio, before, **stage) == list(range(n - expected, n))


def test_layers_of_unequal_width_keep_a_channel_each() -> None:
    both = group(range(2), range(2, 6), range(6))
    values = np.array([0.1, 0.2, 3.0, 4.0, 5.0, 6.0])
    (found,) = choose([both], [values], [Amount(0.9, 6)], definition())
    assert found.tolist() == [0, 2, 3, 4]


def test_a_layer_with_channels_outside_the_group_may_lose_all_within() -> None:
    outside = group([0, 1, 8, 9], range(6), of=range(6))
    values = np.array([0.1, 0.2, 3.0, 4.0, 5.0, 6.0])
    assert set(last_of_each_layer(outside, values)) == {5}
    (found,) = choose([outside], [values], [Amount(0.9, 6)], definition())
    assert found.tolist() == [0, 1, 2, 3, 4]


# Several groups

MANY = st.lists(TIES, min_size=1, max_size=6)


def plain(values: list[list[float]], ratio: float) -> list[Amount]:
    return [Amount(ratio, len(own)) for own in values]


@given(MANY, st.floats(0.01, 0.99))
def test_alone_each_group_is_as_if_there_were_no_other(values: list[list[float]], ratio: float) -> None:
    assert chosen(values, plain(values, ratio)) == [local(own, ratio) for own in values]


@given(MANY, st.floats(0.01, 0.99), st.sampled_from(RULES))
def test_together_the_least_of_all_go(values: list[list[float]], ratio: float, rule: Any) -> None:
    """By brute force: pass the units in order, skip the last of each group, stop at the count."""
    count = remove_count(sum(map(len, values)), ratio, rule)
    order = sorted((value, g, i) for g, own in enumerate(values) for i, value in enumerate(own))
    keep = {(g, max(range(len(own)), key=lambda i: (own[i], i))) for g, own in enumerate(values)}
    goes = [(g, i) for _, g, i in order if (g, i) not in keep][:count]
    expected = [sorted(i for g, i in goes if g == index) for index in range(len(values))]
    assert chosen(values, plain(values, ratio), selection="global", count_rule=rule) == expected


@given(MANY, st.floats(0.01, 0.99), st.integers(1, 5), st.integers(1, 5), st.floats(0.1, 0.9))
def test_together_the_limits_hold_for_each(
    values: list[list[float]], ratio: float, multiple: int, least: int, most: float
) -> None:
    stage = {"selection": "global", "round_to": multiple, "min_channels": least, "max_ratio": most}
    free = chosen(values, plain(values, ratio), selection="global")
    for own, found in zip(values, chosen(values, plain(values, ratio), **stage), strict=True):
        stays = len(own) - len(found)
        assert stays >= min(len(own), least)
        assert stays == len(own) or stays % multiple == 0
        assert len(found) <= remove_count(len(own), most)
        assert found == sorted(sorted(range(len(own)), key=lambda i: (own[i], i))[: len(found)])
    assert sum(map(len, free)) <= remove_count(sum(map(len, values)), ratio)


def test_a_group_at_its_limit_leaves_the_rest_to_the_others() -> None:
    values = [[0.1, 0.2, 0.3, 0.4], [5.0, 6.0, 7.0, 8.0]]
    assert chosen(values, plain(values, 0.5), selection="global") == [[0, 1, 2], [0]]
    assert chosen(values, plain(values, 0.5), selection="global", max_ratio=0.5) == [[0, 1], [0, 1]]
    assert chosen(values, plain(values, 0.5), selection="global", min_channels=3) == [[0], [0]]


def test_ties_between_groups_go_by_the_groups_order() -> None:
    values = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    assert chosen(values, plain(values, 0.5), selection="global") == [[0, 1], [0]]


def test_what_has_gone_before_counts_for_all_together() -> None:
    values = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
    amounts = [Amount(0.5, 6), Amount(0.5, 4)]
    assert chosen(values, amounts, selection="global") == [[0, 1, 2], []]


def test_a_group_with_a_ratio_of_its_own_competes_with_none() -> None:
    values = [[1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4], [5.0, 6.0, 7.0, 8.0], [0.0, 0.0]]
    amounts = [Amount(0.5, 4), Amount(0.25, 4, own=True), Amount(0.5, 4), Amount(0.0, 2)]
    assert chosen(values, amounts, selection="global") == [[0, 1, 2], [0], [0], []]
    same = [Amount(0.5, 4), Amount(0.5, 4, own=True), Amount(0.5, 4), Amount(0.0, 2)]
    assert chosen(values, same, selection="global")[1] == [0, 1]


def test_isomorphic_groups_compete_among_themselves() -> None:
    values = [[1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4], [5.0, 6.0, 7.0, 8.0], [0.3, 0.4, 0.5, 0.6]]
    amounts = plain(values, 0.5)
    found = chosen(values, amounts, ("a", "b", "a", "b"), selection="isomorphic")
    assert found == [[0, 1, 2], [0, 1, 2], [0], [0]]
    assert chosen(values, amounts, "abcd", selection="isomorphic") == chosen(values, amounts)
    assert chosen(values, amounts, "aaaa", selection="isomorphic") == chosen(values, amounts, selection="global")
    with pytest.raises(ValueError, match="structure of each group"):
        chosen(values, amounts, selection="isomorphic")


@pytest.mark.parametrize("selection", ["local", "global", "isomorphic"])
@given(st.data())
def test_no_layer_is_left_empty(selection: Any, data: Any) -> None:
    """Also of layers that make a part of a group, whatever is asked for; and the same twice."""
    groups, values, start = [], [], 0
    for _ in range(data.draw(st.integers(1, 4))):
        n = data.draw(st.integers(1, 12))
        cut = data.draw(st.integers(1, n))
        parts = [range(start, start + cut), range(start + cut, start + n), range(start, start + n)]
        groups.append(group(*(part for part in parts if len(part))))
        values.append(np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), np.float64))
        start += n
    amounts = [Amount(data.draw(st.sampled_from([0.0, 0.3, 0.99])), g.units.size) for g in groups]
    structures = [len(g.producers) for g in groups]
    found = choose(groups, values, amounts, definition(selection=selection), structures)
    again: tuple[Array, ...] = choose(groups, values, amounts, definition(selection=selection), structures)
    for item, positions, other, amount in zip(groups, found, again, amounts, strict=True):
        left = np.delete(item.units, positions)
        assert all(np.isin(producer.units, left).any() for producer in item.producers)
        assert np.array_equal(positions, other) and np.array_equal(positions, np.unique(positions))
        assert amount.ratio > 0 or not positions.size
