"""Quantizers of other toolkits, called as their documentation says; each is imported where it is used only."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.quant_setting import Batch
from benchmarks.toolkits import installed


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, warnings or log lines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@dataclass(frozen=True)
class Images:
    """Batches that can be gone through again, made anew each time."""

    make: Callable[[], Iterator[Batch]]
    count: int

    def __iter__(self) -> Iterator[Batch]:
        return self.make()

    def __len__(self) -> int:
        return self.count


class _Reader:
    """What onnxruntime calls a calibration data reader."""

    def __init__(self, name: str, images: Images) -> None:
        self._name, self._items = name, iter(images)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by the input's name."""
        item = next(self._items, None)
        return None if item is None else {self._name: item[0]}


class OnnxRuntime:
    """onnxruntime's own static quantizer: Q/DQ, unsigned activations, signed weights with a step for each channel."""

    def __init__(self) -> None:
        with installed("deploy"):
            self.onnx, self.module = import_module("onnx"), import_module("onnxruntime.quantization")

    def quantize(self, source: Path, target: Path, images: Images, method: str = "MinMax") -> Path:
        """Calibrate and write; method: "MinMax", "Entropy" or "Percentile"."""
        model, kinds = self.onnx.load(str(source)), self.module.QuantType
        with quiet():
            self.module.quantize_static(
                model,
                str(target),
                _Reader(model.graph.input[0].name, images),
                quant_format=self.module.QuantFormat.QDQ,
                per_channel=True,
                activation_type=kinds.QUInt8,
                weight_type=kinds.QInt8,
                calibrate_method=self.module.CalibrationMethod[method],
            )
        return target


class Nncf:
    """NNCF's post-training quantization with its defaults."""

    def __init__(self) -> None:
        with installed("bench"), quiet():
            self.module = import_module("nncf")
            self.module.set_log_level(logging.ERROR)

    def onnx(self, source: Path, target: Path, images: Images) -> Path:
        """On an ONNX model."""
        with installed("deploy"):
            onnx = import_module("onnx")
        model = onnx.load(str(source))
        onnx.save(self._quantize(model, model.graph.input[0].name, images), str(target))
        return target

    def openvino(self, source: Path, target: Path, images: Images) -> Path:
        """On OpenVINO's model of an ONNX file, into .xml and .bin."""
        with installed("openvino"):
            openvino = import_module("openvino")
        model = openvino.Core().read_model(str(source))
        model.reshape([len(next(iter(images))[0]), *list(model.input(0).partial_shape)[1:]])
        openvino.save_model(self._quantize(model, 0, images), str(target), compress_to_fp16=False)
        return target

    def _quantize(self, model: Any, name: str | int, images: Images) -> Any:
        with quiet():
            data = self.module.Dataset(images, lambda item: {name: item[0]})
            return self.module.quantize(model, data, subset_size=len(images))


class TorchAo:
    """torchao's PT2E flow with X86InductorQuantizer's default configuration."""

    def __init__(self) -> None:
        with installed("torchao"), quiet():
            self.torch = import_module("torch")
            self.flow = import_module("torchao.quantization.pt2e.quantize_pt2e")
            self.x86 = import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        # The torch backend's own work-around: the quantizer fails on a module that runs twice.
        self._split = import_module("slimbridge_torch.native_quant")._split

    def _quantizer(self, training: bool) -> Any:
        quantizer = self.x86.X86InductorQuantizer()
        return quantizer.set_global(self.x86.get_default_x86_inductor_quantization_config(is_qat=training))

    def _exported(self, model: Any, example: Any) -> Any:
        free = None if len(example) == 1 else ({0: self.torch.export.Dim.AUTO},)
        return self.torch.export.export(model, (example,), dynamic_shapes=free).module()

    def calibrate(self, model: Any, images: Images) -> Any:
        """Export, prepare, calibrate, convert; the model is used up."""
        example = self.torch.from_numpy(next(iter(images))[0])
        model.eval()
        with quiet(), self.torch.no_grad():
            self._split(model, (example,))
            prepared = self.flow.prepare_pt2e(self._exported(model, example), self._quantizer(False))
            for batch in images:
                prepared(self.torch.from_numpy(batch[0]))
            return self.flow.convert_pt2e(prepared)

    def trainable(self, model: Any, inputs: Sequence[Any]) -> Any:
        """The program that quantization-aware training trains; the model is used up."""
        example = self.torch.from_numpy(inputs[0])
        with quiet():
            self._split(model.eval(), (example,))
            model.train()
            return self.flow.prepare_qat_pt2e(self._exported(model, example), self._quantizer(True))


class PaddleQuantization:
    """`paddle.quantization` on convolutions and linear layers, with PaddleSlim's observers; quiet."""

    def __init__(self) -> None:
        with installed("paddle"):
            self.paddle = import_module("paddle")
            self._observers = import_module("slimbridge_paddle._compat").paddleslim_observers
            self._silent = import_module("slimbridge_paddle._compat").quiet_paddleslim
            with self._observers():
                pass

    def _config(self, activation: Any, weight: Any) -> Any:
        config = self.paddle.quantization.QuantConfig(activation=None, weight=None)
        layers = [self.paddle.nn.Conv2D, self.paddle.nn.Linear]
        config.add_type_config(layers, activation=activation, weight=weight)
        return config

    def calibrate(self, model: Any, images: Images, observer: str) -> Any:
        """Calibrate and convert, in place; observer: PaddleSlim's class."""
        model.eval()
        with self._observers() as known, self.paddle.no_grad():
            config = self._config(getattr(known, observer)(), known.AbsMaxChannelWiseWeightObserver())
            engine = self.paddle.quantization.PTQ(config)
            model = engine.quantize(model, inplace=True)
            for batch in images:
                model(self.paddle.to_tensor(batch[0]))
            return engine.convert(model, inplace=True)

    def trainable(self, model: Any) -> Any:
        """The model with fake quantization, absmax for each channel and a moving average for each tensor."""
        with self._silent():
            own, more = import_module("paddle.quantization.quanters"), import_module("paddleslim.quant.quanters")
            activation = own.FakeQuanterWithAbsMaxObserver(moving_rate=0.9)
            weight = more.FakeQuanterChannelWiseAbsMaxObserver()
            model.train()
            return self.paddle.quantization.QAT(self._config(activation, weight)).quantize(model, inplace=True)
