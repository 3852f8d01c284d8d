"""One step of quantization-aware training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.harness import Competitor, Series, require
from benchmarks.quant_setting import FARTHEST, Network
from benchmarks.quant_toolkits import PaddleQuantization, TorchAo, quiet
from benchmarks.setting import CLASSES
from slimbridge.distill import hard_labels
from slimbridge.plan import QuantizeStage, TrainSection
from slimbridge.plan.quantizing import QatSection
from slimbridge.ports import Loss, Model, OptimizerSettings, Pass, tensors_in
from slimbridge.quantize.qat import Qat

DISTRIBUTIONS = {
    "torch": ("slimbridge", "numpy", "torch", "torchao"),
    "paddle": ("slimbridge", "numpy", "paddlepaddle", "paddleslim"),
}
_RATE = 1e-3
_MOMENTUM = 0.9
_TRAIN = TrainSection(epochs=1, learning_rate=_RATE)


def _stage(section: QatSection) -> QuantizeStage:
    return QuantizeStage(placement="layer", observer="minmax", qat=section)


AVERAGE = _stage(QatSection(train=_TRAIN))
LSQ = _stage(QatSection(train=_TRAIN, activation_ranges="lsq", weight_ranges="lsq"))

Step = Callable[[], float]
"""One step; gives the loss before it."""


@dataclass(frozen=True)
class Steps:
    """Training steps on one batch of noise, each row's model its own and trained on from run to run."""

    network: Network

    @property
    def labels(self) -> Any:
        """Of the batch."""
        return np.arange(self.network.batch, dtype=np.int64) * 7 % CLASSES

    def loss(self, result: Pass) -> Mapping[str, Any]:
        """Cross entropy."""
        backend = self.network.backend
        labels = backend.tensor(self.network.model, self.labels)
        return {"loss": hard_labels(backend.ops, tensors_in(result.output)[0], labels)}

    def copy(self) -> Model:
        """A fresh model."""
        return self.network.backend.clone(self.network.model)

    def _step(self, model: Model) -> Step:
        """Through the backend."""
        backend, inputs, loss = self.network.backend, self.network.images(0), self.loss
        optimizer = backend.make_optimizer(model, OptimizerSettings(momentum=_MOMENTUM))
        optimizer.set_lr(_RATE)
        checked: Loss = loss
        return lambda: backend.train_step(model, optimizer, inputs, checked)["loss"]

    def plain(self) -> Step:
        """In float."""
        return self._step(self.copy())

    def ours(self, stage: QuantizeStage) -> Step:
        """Under our fake quantization."""
        backend, model = self.network.backend, self.copy()
        quantizer = self.network.quantizer(stage)
        observers = quantizer.observe(backend, model, [self.network.images(0)])
        qat = Qat(quantizer, backend.read(model), quantizer.activation_grids(observers))
        return self._step(backend.insert_quant(model, qat.quants))

    def torchao(self) -> Step:
        """torchao's, with PyTorch's own optimizer."""
        toolkit, inputs = TorchAo(), self.network.images(0)
        torch = toolkit.torch
        model = toolkit.trainable(self.copy(), inputs)
        optimizer = torch.optim.SGD(model.parameters(), lr=_RATE, momentum=_MOMENTUM)
        image, labels = torch.from_numpy(inputs[0]), torch.from_numpy(self.labels)

        def step() -> float:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(image), labels)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step

    def paddle(self) -> Step:
        """paddle.quantization's, with Paddle's own optimizer."""
        toolkit, inputs = PaddleQuantization(), self.network.images(0)
        paddle = toolkit.paddle
        model = toolkit.trainable(self.copy())
        optimizer = paddle.optimizer.Momentum(_RATE, _MOMENTUM, parameters=model.parameters())
        image, labels = paddle.to_tensor(inputs[0]), paddle.to_tensor(self.labels)

        def step() -> float:
            loss = paddle.nn.functional.cross_entropy(model(image), labels)
            loss.backward()
            optimizer.step()
            optimizer.clear_grad()
            return float(loss)

        return step

    def competitor(self, name: str, make: Callable[[], Step], note: str = "", quantized: bool = True) -> Competitor:
        """The first loss is checked: near to the float model's, and another where it is quantized."""
        made: list[Step] = []

        def prepare() -> Step:
            if not made:
                with quiet():
                    made.append(make())
            return made[0]

        def check(loss: float) -> Mapping[str, int]:
            expected = self.plain()()
            difference = abs(loss - expected) / expected
            require(bool(np.isfinite(loss)), "the loss is not finite")
            require(difference <= FARTHEST, f"the first loss is {loss:.4g}, of the float model {expected:.4g}")
            require(not quantized or loss != expected, "the first loss is the float model's: nothing was quantized")
            return {"first loss, thousandths": round(1000 * loss)}

        return Competitor(name, prepare, lambda step: step(), check, note)


def _series(steps: Steps, *competitors: Competitor) -> Series:
    network, note = steps.network, "SGD with momentum; cross entropy"
    rows = (
        steps.competitor("fp32 step", steps.plain, note, quantized=False),
        steps.competitor("slimbridge QAT", lambda: steps.ours(AVERAGE), "moving averages, absmax for each channel"),
        steps.competitor("slimbridge LSQ", lambda: steps.ours(LSQ), "steps learned, of weights for each channel"),
        *competitors,
    )
    found = DISTRIBUTIONS[network.framework]
    return Series(rows, found, network.threads, network.weights_bytes, "ratio to the fp32 step")


def resnet18_torch(size: int = 112, batch: int = 8) -> Series:
    """Ours and torchao."""
    steps = Steps(Network("torch", size=size, batch=batch))
    note = "prepare_qat_pt2e; moving averages; BatchNorm folded in training"
    return _series(steps, steps.competitor("torchao PT2E QAT", steps.torchao, note))


def resnet18_paddle(size: int = 112, batch: int = 8) -> Series:
    """Ours and paddle.quantization."""
    steps = Steps(Network("paddle", size=size, batch=batch))
    note = "QAT.quantize; FakeQuanterWithAbsMax, PaddleSlim's absmax for each channel"
    return _series(steps, steps.competitor("paddle.quantization QAT", steps.paddle, note))
