"""Placement: which tensors get a grid, in graphs written by hand and in the zoo."""

from __future__ import annotations

import numpy as np
import pytest

from slimbridge import zoo
from slimbridge.decisions import Site
from slimbridge.errors import ModelError
from slimbridge.plan import QuantizeStage
from slimbridge.ports import Backend
from slimbridge.quantize import Quantizer
from slimbridge.quantize.fold import find_folds
from slimbridge.quantize.placement import Placement, place_full, place_layers
from tests.handmade import Made


def placed(made: Made, *outputs: int, ignored: tuple[str, ...] = (), fold: bool = True) -> Placement:
    layers = [layer for layer in made.layers.values() if layer.kind != "batch_norm" and layer.path not in ignored]
    graph = made.graph(*outputs)
    folds = find_folds(graph, [layer.params["weight"] for layer in layers]) if fold else ()
    return place_full(graph, [layer.path for layer in layers], folds)


def sites(made: Made, *outputs: int, ignored: tuple[str, ...] = (), fold: bool = True) -> list[str]:
    found = placed(made, *outputs, ignored=ignored, fold=fold)
    assert not found.skipped, found.skipped
    return [str(site) for site in found.sites]


def residual(made: Made, x: int) -> int:
    """A block with one ReLU module that is called twice."""
    first = made.act(made.norm(made.conv(x, "block.conv1"), "block.bn1"), "block.relu")
    second = made.norm(made.conv(first, "block.conv2"), "block.bn2")
    out = made.act(made.binary(second, x, name="block"), "block.relu")
    made.call("block", [x], [out])
    return out


def test_a_residual_block() -> None:
    """The sum's ReLU is part of the sum; each call of the one module has a site of its own."""
    made = Made(1, 3, 6, 6)
    x = made.act(made.norm(made.conv(made.x, "stem"), "bn"), "relu")
    made.linear(made.flatten(made.pool(residual(made, x), "pool", "avg", 1)), "fc")
    expected = ["stem", "relu:output", "block.relu:output#0", "block.bn2:output", "block.relu:output#1", "pool:output"]
    assert sites(made) == expected
    reads = placed(made).reads
    assert {path: [str(site) for site in found] for path, found in reads.items()} == {
        "stem": ["stem"],
        "block.conv1": ["relu:output"],
        "block.conv2": ["block.relu:output#0"],
        "fc": ["pool:output"],
    }


def test_without_folding_the_norm_is_no_part_of_the_layer() -> None:
    made = Made(1, 3, 6, 6)
    made.conv(made.act(made.norm(made.conv(made.x, "a"), "bn"), "relu"), "b")
    assert sites(made) == ["a", "relu:output"]
    assert sites(made, fold=False) == ["a", "a:output", "relu:output"]


def test_a_concatenation() -> None:
    """A function's result is reached where the next module takes it."""
    made = Made(1, 3, 6, 6)
    a, b = made.act(made.conv(made.x, "a"), "ra"), made.conv(made.x, "b")
    both = made.function("concat", [a, b], (1, 8, 6, 6), axis=1)
    made.conv(both, "c")
    assert sites(made) == ["a", "b", "ra:output", "b:output", "c"]


def test_one_tensor_that_two_layers_take() -> None:
    """Without a module that gives it, it is put on the same grid at each of them."""
    made = Made(1, 3, 6, 6)
    made.binary(made.conv(made.x, "a"), made.conv(made.x, "b"))
    placement = placed(made)
    assert [str(site) for site in placement.sites] == ["a", "b", "a:output", "b:output"]


def test_squeeze_and_excitation() -> None:
    made = Made(1, 3, 6, 6)
    x = made.act(made.conv(made.x, "stem"), "swish", "hardswish")
    gate = made.act(made.conv(made.pool(x, "se.pool", "avg", 1), "se.fc1", bias=True), "se.act")
    gate = made.act(made.conv(gate, "se.fc2", bias=True), "se.gate", "hardsigmoid")
    out = made.function("binary", [x, gate], made.shapes[x], "se", op="mul")
    made.call("se", [x], [out])
    made.conv(out, "next")
    assert sites(made) == [
        *("stem", "stem:output", "swish:output", "se.pool:output"),
        *("se.act:output", "se.fc2:output", "se.gate:output", "se:output"),
    ]


@pytest.mark.parametrize("functional", [False, True])
def test_what_only_moves_entries_shares_the_grid(functional: bool) -> None:
    """A max-pool, a reshape and dropout have the grid of what they are given."""
    made = Made(1, 3, 6, 6)
    x = made.act(made.conv(made.x, "conv"), "relu")
    if functional:
        x = made.function("pool", [x], (1, 4, 2, 2), op="max")
    else:
        x = made.pool(x, "pool")
    made.linear(made.function("elementwise", [made.flatten(x)], op="dropout"), "fc")
    assert sites(made) == ["conv", "relu:output"]
    assert placed(made).reads["fc"] == (Site("relu", "output"),)


def test_a_mean_over_space_is_a_pool() -> None:
    made = Made(1, 3, 6, 6)
    x = made.act(made.conv(made.x, "conv"), "relu")
    made.linear(made.function("reduce", [x], (1, 4), op="mean", axes=(2, 3), keepdims=False), "fc")
    assert sites(made) == ["conv", "relu:output", "fc"]


def test_the_models_outputs_stay_as_they_are() -> None:
    made = Made(1, 3, 6, 6)
    x = made.act(made.conv(made.x, "a"), "relu")
    y, z = made.conv(x, "b"), made.conv(x, "c")
    assert sites(made, y, z) == ["a", "relu:output"]
    last = made.act(made.conv(y, "d"), "end")
    assert sites(made, last, z) == ["a", "relu:output", "b:output"]


def test_a_relu_is_part_of_the_layer_only_where_nothing_else_reads_it() -> None:
    made = Made(1, 3, 6, 6)
    x = made.conv(made.x, "a")
    y = made.binary(made.act(x, "relu"), x)
    made.conv(y, "b")
    assert sites(made) == ["a", "a:output", "relu:output", "b"]


def test_layers_that_stay_in_float() -> None:
    """Between two of them nothing is put on a grid."""
    made = Made(1, 3, 6, 6)
    x = made.x
    for path in "abcd":
        x = made.act(made.conv(x, path), f"relu_{path}")
    made.conv(x, "e")
    assert sites(made, ignored=("b", "c")) == ["a", "relu_a:output", "relu_c:output", "relu_d:output"]
    assert sites(made, ignored=("a", "b", "c")) == ["relu_c:output", "relu_d:output"]
    assert sites(made, ignored=("a", "b", "c", "d")) == ["relu_d:output"]


def test_tensors_between_functions_are_told_and_the_layers_keep_their_inputs() -> None:
    """A sum that two functions read lies where no module sees it."""
    made = Made(1, 3, 6, 6)
    a, b = made.conv(made.x, "a"), made.conv(made.x, "b")
    total = made.binary(a, b)
    product = made.binary(total, made.function("elementwise", [total], op="sigmoid"), "mul")
    made.conv(product, "c")
    placement = placed(made)
    assert [str(site) for site in placement.sites] == ["a", "b", "a:output", "b:output", "c"]
    assert [item.layer for item in placement.skipped] == ["the model: add", "the model: sigmoid"]
    assert "functions of the same forward read it" in placement.skipped[0].reason


def test_a_layer_has_its_input_on_a_grid_though_others_read_it_too() -> None:
    """A function that reads what a convolution reads would see it without the grid; the convolution has its own."""
    made = Made(1, 3, 6, 6)
    a, b = made.conv(made.x, "a"), made.conv(made.x, "b")
    total = made.binary(a, b)
    made.binary(made.conv(total, "c"), total)
    placement = placed(made)
    assert Site("c") in placement.sites
    assert placement.reads["c"] == (Site("c"),)
    assert [item.layer for item in placement.skipped] == ["the model: add"]


def test_constants_have_no_grid() -> None:
    made = Made(1, 3, 6, 6)
    half = made.function("constant", [], ())
    made.conv(made.binary(made.act(made.conv(made.x, "a"), "relu"), half, "mul"), "b")
    assert sites(made) == ["a", "relu:output", "b"]


def test_layer_placement_takes_each_layers_input() -> None:
    placement = place_layers(["b", "a.0"])
    assert placement.sites == (Site("b"), Site("a.0"))
    assert placement.reads["a.0"] == (Site("a.0"),)


def test_full_placement_needs_the_module_calls() -> None:
    made = Made(1, 3, 6, 6)
    made.conv(made.x, "a")
    made.calls.clear()
    quantizer = Quantizer(QuantizeStage(), list(made.layers.values()), made.graph())
    with pytest.raises(ModelError, match=r"allowed for this model: placement layer") as caught:
        _ = quantizer.placement
    assert len(str(caught.value).splitlines()) == 2
    layer = Quantizer(QuantizeStage(placement="layer"), list(made.layers.values()), made.graph())
    assert layer.placement.sites == (Site("a"),)


ZOO = {"resnet18": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64}


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_placed_alike_on_both_frameworks(name: str, torch_backend: Backend, paddle_backend: Backend) -> None:
    image = np.zeros((1, 3, ZOO[name], ZOO[name]), np.float32)
    found = []
    for side in (torch_backend, paddle_backend):
        model = zoo.build(name, side)
        quantizer = Quantizer(QuantizeStage(), side.layers(model), side.trace(model, [image]))
        found.append((quantizer.placement.sites, quantizer.folds, quantizer.skipped, quantizer.placement.reads))
    assert found[0] == found[1]
    assert not found[0][2]
    assert len(found[0][0]) > len(found[0][3]), "sums and pools too"


def test_a_module_that_holds_all_readers_takes_the_tensor_for_them() -> None:
    """What a function makes is read, within one block, by a convolution and by a sum: the block is given it."""
    made = Made(1, 3, 6, 6)
    start = made.function("elementwise", [made.conv(made.x, "stem")], op="relu")
    total = made.binary(made.conv(start, "block.conv"), start, name="block")
    made.call("block", [start], [total])
    placement = placed(made)
    assert Site("block") in placement.sites
    assert placement.reads["block.conv"] == (Site("block"),)
    assert placement.skipped == ()
