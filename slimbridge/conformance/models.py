"""Cases on models: layout, names, forward, capture, placement."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimbridge.conformance.suite import Bench, case, refuses, require, within
from slimbridge.conformance.topologies import SIZE, TOPOLOGIES
from slimbridge.parity.measure import differing, relative
from slimbridge.ports import Array, Model, tensors_in


def random(*shape: int, seed: int = 0) -> Array:
    """Standard normal float32 values, the same everywhere."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def image(batch: int = 2) -> Array:
    """Input of the topologies, shape (batch, 3, SIZE, SIZE)."""
    return random(batch, 3, SIZE, SIZE, seed=batch)


def topology(bench: Bench, name: str, dtype: Any = "float32") -> Model:
    """One of the topologies, placed."""
    found = next(item for item in TOPOLOGIES if item.name == name)
    return bench.backend.place(found.build(bench.backend), bench.device, dtype)


def output(bench: Bench, model: Model, *inputs: Array) -> Array:
    """First output of a forward pass."""
    return bench.backend.ops.numpy(tensors_in(bench.backend.forward(model, inputs).output)[0])


def conv2d(x: Array, weight: Array, bias: Array, groups: int) -> Array:
    """By the definition: (N, I, H, W), (O, I/groups, 3, 3) -> (N, O, H, W), stride 1, padding 1, float64."""
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    n, _, height, width = x.shape
    outputs, inputs = weight.shape[:2]
    result = np.zeros((n, outputs, height, width))
    for o in range(outputs):
        first = o // (outputs // groups) * inputs
        for i, j in np.ndindex(3, 3):
            window = padded[:, first : first + inputs, i : i + height, j : j + width]
            result[:, o] += np.einsum("nchw,c->nhw", window, weight[o, :, i, j].astype(np.float64))
    return np.asarray(result + bias[:, None, None])


@case("layout: linear weights are (out, in)")
def linear_layout(bench: Bench) -> None:
    """Y = x W^T + b, for a square layer too, where a swapped axis shows only in the values."""
    for size in ((4, 3), (3, 3)):
        model = bench.backend.place(bench.backend.nn.Linear(size[1], size[0]), bench.device)
        weight, bias, x = random(*size, seed=1), random(size[0], seed=2), random(5, size[1], seed=3)
        model = bench.backend.write(model, {"weight": weight, "bias": bias})
        within("x W^T + b", relative(output(bench, model, x), x.astype(np.float64) @ weight.T + bias), "operation")
        require(np.array_equal(bench.backend.read(model)["weight"], weight), "read gives other weights than written")


@case("layout: convolution weights are (out, in / groups, height, width)")
def conv_layout(bench: Bench) -> None:
    """Plain, grouped and depthwise convolution against the definition."""
    for inputs, outputs, groups in ((3, 4, 1), (4, 6, 2), (4, 4, 4)):
        model = bench.backend.nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)
        model = bench.backend.place(model, bench.device)
        weight, bias = random(outputs, inputs // groups, 3, 3, seed=1), random(outputs, seed=2)
        model = bench.backend.write(model, {"weight": weight, "bias": bias})
        x = random(2, inputs, 5, 4, seed=3)
        found = relative(output(bench, model, x), conv2d(x, weight, bias, groups))
        within(f"groups={groups}", found, "operation")


@case("weights: read, write, clone")
def read_write(bench: Bench) -> None:
    """Round trip to the last bit; copies are independent; what does not fit is refused and changes nothing."""
    backend = bench.backend
    model = topology(bench, "residual")
    before = backend.read(model)
    copy = backend.clone(model)
    changed = {name: array + 1 for name, array in before.items()}
    copy = backend.write(copy, changed)
    require(differing(backend.read(copy), changed) == 0, "read after write gives other values")
    require(differing(backend.read(model), before) == 0, "writing to a clone changed the original")
    name = "fc.weight"
    refuses("an unknown name", lambda: backend.write(model, {**changed, "fc.wieght": before[name]}))
    refuses("a missing name", lambda: backend.write(model, {key: changed[key] for key in changed if key != name}))
    refuses("a wrong shape", lambda: backend.write(model, {**changed, name: before[name].T}))
    require(differing(backend.read(model), before) == 0, "a refused write changed the model")
    backend.read(model)[name][:] = 0
    require(differing(backend.read(model), before) == 0, "read gives views instead of copies")


@case("names: statistics are running_mean and running_var")
def statistics_names(bench: Bench) -> None:
    """Canonical names, and layers that name their parameters."""
    model = topology(bench, "residual")
    names = set(bench.backend.read(model))
    wanted = {f"body.stem.1.{role}" for role in ("weight", "bias", "running_mean", "running_var")}
    require(wanted <= names, f"missing: {sorted(wanted - names)}")
    require(not any("num_batches" in name for name in names), "num_batches_tracked is not canonical")
    listed = {name for layer in bench.backend.layers(model) for name in layer.params.values()}
    require(listed == names, f"layers and read name different parameters: {sorted(listed ^ names)}")


@case("forward: eval mode, features by path")
def capture(bench: Bench) -> None:
    """Captured features equal the layer's output; samples do not see each other; a wrong path is refused."""
    backend = bench.backend
    model = topology(bench, "residual")
    x = image()
    first, second = output(bench, model, x), output(bench, model, x[:1])
    within("batch 1 against batch 2", relative(second, first[:1]), "forward")
    result = backend.forward(model, [x], capture=("fc", "body.shortcut"))
    require(set(result.features) == {"fc", "body.shortcut"}, f"captured {sorted(result.features)}")
    require(
        np.array_equal(backend.ops.numpy(result.features["fc"]), first), "the last layer's feature is not the output"
    )
    refuses("a wrong path", lambda: backend.forward(model, [x], capture=("body.shortcot",)))


@case("normalisation: eval uses the running statistics")
def batch_norm_eval(bench: Bench) -> None:
    """(x - mean) / sqrt(var + 1e-5) * weight + bias."""
    model = bench.backend.place(bench.backend.nn.BatchNorm2d(3), bench.device)
    arrays = {"weight": random(3, seed=1), "bias": random(3, seed=2), "running_mean": random(3, seed=3)}
    arrays["running_var"] = np.abs(random(3, seed=4)) + 0.5
    model = bench.backend.write(model, arrays)
    x = random(2, 3, 4, 4)
    shaped = {name: array.astype(np.float64)[:, None, None] for name, array in arrays.items()}
    expected = (x - shaped["running_mean"]) / np.sqrt(shaped["running_var"] + 1e-5)
    found = relative(output(bench, model, x), expected * shaped["weight"] + shaped["bias"])
    within("BatchNorm in eval mode", found, "operation")


@case("capabilities: versions, devices, placement")
def capabilities(bench: Bench) -> None:
    """The CPU is always there; float64 survives a round trip; an unknown device is refused."""
    backend = bench.backend
    facts = backend.capabilities()
    require(facts.versions, "no version is named")
    require("cpu" in facts.devices, f"devices are {facts.devices}")
    require(facts.backend == backend.name, f"capabilities say '{facts.backend}', the backend is '{backend.name}'")
    model = backend.place(backend.nn.Linear(2, 2), bench.device, "float64")
    precise = np.array([[1 / 3, 2 / 3], [1e-12, 1.0]])
    model = backend.write(model, {"weight": precise, "bias": np.zeros(2)})
    require(np.array_equal(backend.read(model)["weight"], precise), "float64 weights lose digits")
    require(backend.owns(model) and not backend.owns(object()), "owns is wrong")
    refuses("an unknown device", lambda: backend.place(model, "abacus"))  # type: ignore[arg-type]
