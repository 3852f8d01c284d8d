"""Whole models become int8 files on both frameworks: concatenation, gates, depthwise, dense and grouped wirings."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from slimbridge.decisions import QuantizeDecision, Site
from slimbridge.deploy.onnx_file import write_onnx
from slimbridge.deploy.onnx_run import fusion, open_runtime
from slimbridge.discovery import get_backend
from slimbridge.parity import relative, tolerance
from slimbridge.plan import QuantizeStage
from slimbridge.ports import Array, tensors_in
from slimbridge.quantize.fake import Recorder
from slimbridge.quantize.quantizer import apply
from slimbridge.quantize_stage import decide_grids
from tests.architectures import ARCHITECTURES, ZOO, build

# Convolutions that a net has, and its concatenations or products, all computed in integers.
NETS = {
    "squeezenet": {"convolutions": 14, "concatenations": 4},
    "densenet": {"convolutions": 17, "concatenations": 7},
    "regnet_y": {"convolutions": 24, "adds": 4, "products": 4},
    "mobilenet_v3": {"convolutions": 52, "adds": 6},
    "mobilenet_v2": {"convolutions": 52, "adds": 12},
}


def samples(name: str) -> list[Array]:
    side = (ZOO if name in ZOO else ARCHITECTURES)[name][1]
    return [np.random.default_rng(seed).standard_normal((4, 3, side, side)).astype(np.float32) for seed in range(3)]


@cache
def decided(name: str, backend: str) -> QuantizeDecision:
    side, batches = get_backend(backend), samples(name)
    model = build(name, side)
    return decide_grids(side, model, QuantizeStage(), [batches[0][:2]], [(batch,) for batch in batches])


@pytest.mark.parametrize("name", NETS)
def test_one_placement_on_both(name: str) -> None:
    ours, theirs = decided(name, "torch"), decided(name, "paddle")
    assert list(ours.activations) == list(theirs.activations)
    assert ours.weights == theirs.weights
    assert ours.folds == theirs.folds


@pytest.mark.parametrize("backend", ["torch", "paddle"])
@pytest.mark.parametrize("name", NETS)
def test_the_file_computes_what_the_model_computes_in_integers(name: str, backend: str, tmp_path: Path) -> None:
    side, decision, batch = get_backend(backend), decided(name, backend), samples(name)[1]
    model = apply(side, build(name, side), decision)
    plain = side.insert_quant(side.clone(model), {})
    seen = {key: Recorder() for key in decision.activations}
    watched = side.insert_quant(side.clone(plain), {Site.parse(key): recorder for key, recorder in seen.items()})
    side.forward(watched, [batch[:1]])
    side.export(plain, [batch[:1]], tmp_path, "onnx_float")
    file = tmp_path / "model.onnx"
    values = {key: recorder.value for key, recorder in seen.items() if recorder.value is not None}
    write_onnx(file, decision, side.read(plain), values, [batch[:1]])
    run = open_runtime(file, "onnxruntime", 1, optimise=False)
    for sample in (batch[:1], batch[1:2]):
        expected = side.ops.numpy(tensors_in(side.forward(model, [sample]).output)[0])
        assert relative(run([sample])[0], expected) <= tolerance("export_runtime").value
    counts = fusion(file).counts
    assert {kind: counts[kind][0] for kind in NETS[name]} == NETS[name]
