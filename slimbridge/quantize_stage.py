"""How a quantize stage is carried out: calibrate, decide, and where the plan says so train before deciding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from slimbridge.decisions import QuantizeDecision, Site
from slimbridge.errors import PlanError, listed, nearest
from slimbridge.plan import QuantizeStage
from slimbridge.plan.registries import Observer
from slimbridge.ports import Array, Backend, Model, QuantRequest
from slimbridge.quantize.qat import Qat
from slimbridge.quantize.quantizer import Quantizer, apply
from slimbridge.quantize.targets import QUANTIZABLE
from slimbridge.stages import Outcome, Scene, calibration_stream, on_labels, skipped_notes, train_stage
from slimbridge.tasks import Data
from slimbridge.train import Progress, evaluate


def quantize_stage(scene: Scene, name: str, stage: QuantizeStage, model: Model) -> Outcome:
    """Put a model on integer grids."""
    backend = scene.backend
    scene.progress.start(f"{name}: calibrating", stage.calibration_batches if stage.mode == "static" else 1)
    inputs = _told(calibration_inputs(backend, scene.data, scene.plan.seed, stage), scene.progress)
    if stage.engine == "native":
        return _native(scene, stage, model, inputs)
    quantizer = _quantizer(backend, model, stage, scene.example)
    observers = _observers(quantizer, backend, model, inputs)
    if stage.qat is not None:
        return _trained(scene, name, quantizer, model, observers)
    decision = quantizer.decide(backend.read(model), observers)
    return Outcome(apply(backend, model, decision), decision, notes=_notes(scene, model, decision, quantizer.observed))


def calibration_inputs(backend: Backend, data: Data, seed: int, stage: QuantizeStage) -> Iterator[tuple[Array, ...]]:
    """Inputs of the training batches that a stage calibrates on, one batch at a time."""
    return (inputs for inputs, _ in calibration_stream(backend, data, seed, stage))


def decide_grids(
    backend: Backend,
    model: Model,
    stage: QuantizeStage,
    example: Sequence[Array],
    inputs: Iterable[tuple[Array, ...]],
) -> QuantizeDecision:
    """Observe the calibration inputs and decide, for a stage without training."""
    quantizer = _quantizer(backend, model, stage, example)
    return quantizer.decide(backend.read(model), _observers(quantizer, backend, model, inputs))


def rehearse_quantize(backend: Backend, model: Model, stage: QuantizeStage, example: Sequence[Array]) -> None:
    """Look for what would stop the stage, with the weights as they are and the example in place of the data.

    Raises:
        SlimbridgeError: what `quantize_stage` would raise.
    """
    if stage.native is not None:
        known = backend.capabilities().native_quantizers
        name = stage.native.quantizer
        if name not in known:
            raise PlanError(
                [f"native.quantizer '{name}' is not there on {backend.name}{nearest(name, known)}; "
                 f"it has: {listed(known) or 'none'}"]
            )  # fmt: skip
        return
    quantizer = _quantizer(backend, model, stage, example)
    quantizer.weight_grids(backend.read(model))
    if stage.mode == "static":
        quantizer.observe(backend, model, [example])


def _quantizer(backend: Backend, model: Model, stage: QuantizeStage, example: Sequence[Array]) -> Quantizer:
    return Quantizer(stage, backend.layers(model), backend.trace(model, example))


def _observers(
    quantizer: Quantizer, backend: Backend, model: Model, inputs: Iterable[tuple[Array, ...]]
) -> Mapping[Site, Observer]:
    return quantizer.observe(backend, model, inputs) if quantizer.stage.mode == "static" else {}


def _trained(
    scene: Scene, name: str, quantizer: Quantizer, model: Model, observers: Mapping[Site, Observer]
) -> Outcome:
    """Quantization-aware training, then the grids that it ended with."""
    backend = scene.backend
    section = quantizer.stage.qat
    assert section is not None
    qat = Qat(quantizer, backend.read(model), quantizer.activation_grids(observers))
    model = backend.insert_quant(model, qat.quants)
    before = evaluate(backend, model, scene.data.test, scene.metric, scene.progress)
    objective = on_labels(scene, model)
    steer = qat.steering(backend, section.train.epochs)
    model, epochs = train_stage(scene, name, section.train, model, objective, before_step=steer)
    values = backend.read(model)
    model = backend.hold_statistics(backend.insert_quant(model, {}), False)
    decision, real = qat.decide(values)
    model = apply(backend, backend.write(model, real, partial=True), decision)
    notes = _notes(scene, model, decision, quantizer.observed)
    return Outcome(model, decision, metric_before_training=before, epochs=epochs, notes=notes)


def _native(scene: Scene, stage: QuantizeStage, model: Model, inputs: Iterable[tuple[Array, ...]]) -> Outcome:
    """Another toolkit is given all batches at once."""
    assert stage.native is not None
    batches = list(inputs)
    request = QuantRequest(
        quantizer=stage.native.quantizer,
        weight_bits=stage.weight_bits,
        activation_bits=stage.activation_bits,
        ignored=stage.ignored_layers,
        options=stage.native.options,
    )
    decision = scene.backend.native_quantize(model, request, batches)
    model = apply(scene.backend, model, decision)
    line = f"decided by {stage.native.quantizer}, applied by slimbridge"
    return Outcome(model, decision, notes=(line, *_notes(scene, model, decision, len(batches))))


def _told(items: Iterable[tuple[Array, ...]], progress: Progress) -> Iterator[tuple[Array, ...]]:
    for item in items:
        yield item
        progress.step()


def _notes(scene: Scene, model: Model, decision: QuantizeDecision, found: int) -> tuple[str, ...]:
    candidates = sum(layer.kind in QUANTIZABLE for layer in scene.backend.layers(model))
    line = f"{len(decision.weights)} of {candidates} convolution and linear layers quantized"
    if decision.mode == "static":
        line += f", {len(decision.activations)} tensors on grids, {found} calibration batches"
    narrow = any(grid.high - grid.low < 254 for grid in (*decision.weights.values(), *decision.activations.values()))
    speed = "this model computes its integers in float and is no faster; " + (
        "`slimbridge export` writes a smaller file, which is no faster either"
        if decision.mode == "weight_only"
        else "`slimbridge export` writes files that compute in int8" + (", in which fewer bits are no faster" * narrow)
    )
    return (line, speed, *skipped_notes(decision.skipped))
