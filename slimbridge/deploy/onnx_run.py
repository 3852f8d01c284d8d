"""Running ONNX files, and seeing what a runtime really computes in integers."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from slimbridge.deploy.onnx_net import failures, require
from slimbridge.errors import BackendError, ModelError, first_line, listed, nearest
from slimbridge.ports import Array

Run = Callable[[Sequence[Array]], list[Array]]
RUNTIMES = ("onnxruntime", "openvino")
_KINDS = {
    "convolutions": (("QLinearConv", "ConvInteger"), ("Conv", "FusedConv")),
    "linear layers": (
        ("QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
        ("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits"),
    ),
    "adds": (("QLinearAdd",), ("Add",)),
    "products": (("QLinearMul",), ("Mul",)),
    "concatenations": (("QLinearConcat",), ("Concat",)),
    "average pools": (
        ("QLinearGlobalAveragePool", "QLinearAveragePool"),
        ("GlobalAveragePool", "AveragePool", "ReduceMean"),
    ),
}


@dataclass(frozen=True)
class Fusion:
    """What onnxruntime computes after all its graph optimisations.

    Attributes:
        operators: operator -> how often, over all domains.
        integer: kind of layer, plural -> how many are computed in integers.
        total: kind of layer -> how many there are; kinds that the model has none of are left out.
    """

    operators: Mapping[str, int]
    integer: Mapping[str, int]
    total: Mapping[str, int]

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """Kind of layer -> how many are computed in integers, of how many."""
        return {kind: (self.integer[kind], count) for kind, count in self.total.items()}

    def __str__(self) -> str:
        """For example "20 of 20 convolutions, 8 of 8 adds"."""
        return ", ".join(f"{self.integer[kind]} of {count} {kind}" for kind, count in self.total.items())


def runtimes() -> dict[str, str]:
    """The installed runtimes, with their versions."""
    found = {}
    for name in RUNTIMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def open_runtime(path: Path, runtime: str, threads: int = 1, optimise: bool = True) -> Run:
    """A function that runs a file, from inputs (in the order of the graph's) to outputs.

    Args:
        path: an ONNX file.
        runtime: "onnxruntime" or "openvino".
        threads: for one operation.
        optimise: False leaves the graph as it is written, each operator by itself; onnxruntime only.

    Raises:
        BackendError: the runtime is unknown or not installed, or cannot do without optimisation.
        ModelError: it cannot load the file; the function raises it when a pass fails.
    """
    if runtime not in RUNTIMES:
        raise BackendError(f"no runtime '{runtime}'{nearest(runtime, RUNTIMES)}; allowed: {listed(RUNTIMES)}")
    if runtime == "openvino" and not optimise:
        raise BackendError("openvino always optimises the graph; use onnxruntime to run it as it is written")
    opener = _openvino if runtime == "openvino" else _onnxruntime
    try:
        run = opener(path, threads, optimise)
    except failures() as error:
        raise ModelError(f"{path}: {runtime} cannot load it: {first_line(error)}") from error

    def guarded(inputs: Sequence[Array]) -> list[Array]:
        try:
            return run(inputs)
        except failures() as error:
            raise ModelError(f"{path}: {runtime} cannot run it: {first_line(error)}") from error

    return guarded


def fusion(path: Path) -> Fusion:
    """Count what onnxruntime makes of a file on this machine.

    Raises:
        ModelError: it cannot load the file.
        BackendError: onnx or onnxruntime is not installed.
    """
    onnx = require("onnx")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimised.onnx"
        try:
            _session(path, 1, True, target)
        except failures() as error:
            raise ModelError(f"{path}: onnxruntime cannot load it: {first_line(error)}") from error
        operators = Counter(item.op_type for item in onnx.load(str(target)).graph.node)
    integer = {kind: sum(operators[name] for name in names) for kind, (names, _) in _KINDS.items()}
    total = {kind: integer[kind] + sum(operators[name] for name in names) for kind, (_, names) in _KINDS.items()}
    present = {kind: count for kind, count in total.items() if count}
    return Fusion(dict(operators), {kind: integer[kind] for kind in present}, present)


def _session(path: Path, threads: int, optimise: bool, target: Path | None = None) -> Any:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    # Float32 inputs stay so for linear layers with integer weights; the default rounds them to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if target is not None:
        options.optimized_model_filepath = str(target)
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _onnxruntime(path: Path, threads: int, optimise: bool) -> Run:
    session = _session(path, threads, optimise)
    names = [item.name for item in session.get_inputs()]
    return lambda inputs: list(session.run(None, dict(zip(names, inputs, strict=True))))


def _openvino(path: Path, threads: int, optimise: bool) -> Run:
    # Left to itself OpenVINO computes float models in bfloat16 where the processor has it, and rounds the inputs of
    # linear layers with integer weights to 8 bits.
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    options |= {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    core = require("openvino").Core()
    model = core.read_model(str(path))
    requests: dict[Any, Any] = {}

    def compiled(shapes: tuple[tuple[int, ...], ...]) -> Any:
        # A free batch axis costs some of the fusions, so it is fixed to the inputs' before compiling.
        if model.is_dynamic() or requests:
            model.reshape({model.input(place): list(shape) for place, shape in enumerate(shapes)})
        return core.compile_model(model, "CPU", options).create_infer_request()

    def run(inputs: Sequence[Array]) -> list[Array]:
        shapes = tuple(array.shape for array in inputs)
        if shapes not in requests:
            requests[shapes] = compiled(shapes)
        found = requests[shapes].infer(list(inputs))
        return [np.array(found[output]) for output in requests[shapes].get_compiled_model().outputs]

    return run
