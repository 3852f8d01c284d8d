"""PaddleSlim's pruners as engines: what they choose, against NumPy, and how they fail."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is an optional extra")
pytest.importorskip("paddleslim", reason="PaddleSlim is an optional extra")

import slimbridge_paddle  # noqa: E402
from slimbridge.decisions import QuantParams, Site  # noqa: E402
from slimbridge.errors import BackendError, ModelError  # noqa: E402
from slimbridge.parity import tolerance  # noqa: E402
from slimbridge.parity.measure import relative  # noqa: E402
from slimbridge.ports import NativeRequest  # noqa: E402
from slimbridge.quantize.fake import Static  # noqa: E402
from slimbridge_paddle import native  # noqa: E402

nn = paddle.nn
F = paddle.nn.functional
BACKEND = slimbridge_paddle.create()
IMAGES = np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)
L1, FPGM, MASKED, GRADUAL = (
    f"paddleslim.{name}"
    for name in ("L1NormFilterPruner", "FPGMFilterPruner", "UnstructuredPruner", "GMPUnstructuredPruner")
)


class Small(nn.Layer):
    """stem -> residual block -> depthwise -> pool -> linear."""

    def __init__(self, head: str = "pool") -> None:
        super().__init__()
        self.stem = nn.Conv2D(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2D(8)
        self.inner = nn.Conv2D(8, 6, 3, padding=1)
        self.outer = nn.Conv2D(6, 8, 1)
        self.dw = nn.Conv2D(8, 8, 3, groups=8)
        self.fc = nn.Linear(8, 4)
        self.head = head

    def forward(self, x: Any) -> Any:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.dw(x + self.outer(F.relu(self.inner(x)))))
        x = x.mean([2, 3]) if self.head == "mean" else F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(x)


def small(head: str = "pool", dtype: Any = "float32") -> Any:
    """The model with weights that are the same in every test."""
    model = Small(head)
    rng = np.random.default_rng(1)
    shapes = {name: array.shape for name, array in BACKEND.read(model).items()}
    BACKEND.write(model, {name: np.abs(rng.normal(size=shape)) + 0.1 for name, shape in shapes.items()})
    return BACKEND.place(model, "cpu", dtype)


def strongest(weight: Any, ratio: float) -> tuple[int, ...]:
    """Filters that stay: the PaddleSlim rule, mean magnitude and round(n * ratio) gone."""
    score = np.abs(weight.astype(np.float64)).mean((1, 2, 3))
    gone = min(len(score) - 1, round(len(score) * ratio))
    return tuple(sorted(np.argsort(score, kind="stable")[gone:].tolist()))


def test_l1_removes_the_weakest_of_each_group_and_its_model_runs() -> None:
    model = small()
    before = BACKEND.read(model)
    done = BACKEND.native(model, NativeRequest(L1, 0.5), [IMAGES])
    stem, inner = strongest(before["stem.weight"], 0.5), strongest(before["inner.weight"], 0.5)
    assert done.kept == {
        "stem.weight": stem, "outer.weight": stem, "dw.weight": stem, "inner.weight": inner,
    }  # fmt: skip
    assert not done.masks and [array.shape for array in done.output] == [(2, 4)]
    after = BACKEND.read(model)
    assert all(np.array_equal(before[name], after[name]) for name in before) and list(before) == list(after)
    assert model.training and paddle.in_dynamic_mode()


def test_the_pruned_model_gives_what_zeroed_channels_give() -> None:
    model = small()
    done = BACKEND.native(model, NativeRequest(L1, 0.5, {"inner": 0.5}), [IMAGES])
    arrays = BACKEND.read(model)
    for role in ("weight", "bias"):
        arrays[f"inner.{role}"][[i for i in range(6) if i not in done.kept["inner.weight"]]] = 0
    expected = BACKEND.forward(BACKEND.write(model, arrays), [IMAGES]).output.numpy()
    assert relative(done.output[0], expected) < tolerance("removal").value


def test_ratios_of_layers_and_ignored_ones() -> None:
    model = small()
    weight = BACKEND.read(model)["inner.weight"]
    done = BACKEND.native(model, NativeRequest(L1, 0.9, {"inner": 0.25}), [IMAGES])
    assert done.kept == {"inner.weight": strongest(weight, 0.25)}
    done = BACKEND.native(model, NativeRequest(L1, 0.5, {"dw": 0.25}), [IMAGES])
    assert {name: len(kept) for name, kept in done.kept.items()} == {
        "stem.weight": 6,
        "outer.weight": 6,
        "dw.weight": 6,
    }
    done = BACKEND.native(model, NativeRequest(L1, 0.5, ignored=("outer",)), [IMAGES])
    assert set(done.kept) == {"inner.weight"}


def test_fpgm_keeps_the_filters_that_lie_far_from_the_others() -> None:
    model = small()
    flat = BACKEND.read(model)["inner.weight"].reshape(6, -1).astype(np.float64)
    distance = np.sqrt(((flat[:, None] - flat[None]) ** 2).sum(-1)).sum(-1)
    done = BACKEND.native(model, NativeRequest(FPGM, 0.5, {"inner": 0.5}), [IMAGES])
    assert done.kept["inner.weight"] == tuple(sorted(np.argsort(distance)[3:].tolist()))


def test_a_model_in_float64_stays_so_and_inserted_quantization_does_not_count() -> None:
    model = small(dtype="float64")
    BACKEND.insert_quant(model, {Site("inner"): Static(QuantParams(step=(0.5,), low=-127, high=127))})
    done = BACKEND.native(model, NativeRequest(L1, 0.5), [IMAGES])
    assert done.kept == BACKEND.native(small(), NativeRequest(L1, 0.5), [IMAGES]).kept
    assert model.inner.weight.dtype == paddle.float64 and done.output[0].dtype == np.float32


def test_what_paddleslim_cannot_do_is_named() -> None:
    with pytest.raises(ModelError, match="the model that L1NormFilterPruner pruned does not run"):
        BACKEND.native(small("mean"), NativeRequest(L1, 0.5), [IMAGES])
    with pytest.raises(ModelError, match="L1NormFilterPruner removed nothing; it took 0 of"):
        BACKEND.native(small(), NativeRequest(L1, 0.5, {"fc": 0.5}), [IMAGES])
    with pytest.raises(ModelError, match="L1NormFilterPruner failed"):
        BACKEND.native(small(), NativeRequest(L1, 0.5), [IMAGES[0, 0]])
    assert paddle.in_dynamic_mode()


def test_requests_that_are_wrong_are_named() -> None:
    cases: list[tuple[NativeRequest, type[Exception], str]] = [
        (
            NativeRequest("paddleslim.L3", 0.5),
            BackendError,
            "unknown pruner 'paddleslim.L3'; allowed: paddleslim.L1Norm",
        ),
        (
            NativeRequest(L1, 0.5, options={"leaves": 1}),
            BackendError,
            "no option leaves; it has skip_leaves, prune_type",
        ),
        (NativeRequest(L1, 0.5, ignored=("stm",)), ModelError, r"no layer 'stm' \(did you mean 'stem'"),
        (NativeRequest(MASKED, 0.5, {"stem": 0.1}), BackendError, "one ratio for all layers, 1 were given"),
        (NativeRequest(MASKED, 0.5, options={"prune_params_type": "all"}), BackendError, "found 'all'"),
        (NativeRequest(MASKED, 0.5, options={"sparse_block": [0, 1]}), ModelError, "valid sparse block"),
        (NativeRequest(MASKED, 0.0), ModelError, "UnstructuredPruner masked nothing in 5 weights"),
    ]
    for request, error, text in cases:
        with pytest.raises(error, match=text):
            BACKEND.native(small(), request, [IMAGES])


def weights(model: Any) -> dict[str, Any]:
    """The weights that may be masked."""
    return {name: array for name, array in BACKEND.read(model).items() if name.endswith("t") and array.ndim > 1}


def threshold(values: Any, ratio: float) -> float:
    """PaddleSlim 2.6.0: the round(n * ratio)-th smallest magnitude; what equals it stays."""
    return float(np.sort(np.abs(values))[max(0, round(ratio * values.size) - 1)])


@pytest.mark.parametrize("pruner", [MASKED, GRADUAL])
@pytest.mark.parametrize("local", [False, True])
def test_masks(pruner: str, local: bool) -> None:
    model = small()
    known = weights(model)
    done = BACKEND.native(model, NativeRequest(pruner, 0.6, options={"local_sparsity": local}), [IMAGES])
    together = threshold(np.concatenate([array.ravel() for array in known.values()]), 0.6)
    assert set(done.masks) == set(known) and not done.kept and done.output is None
    for name, array in known.items():
        limit = threshold(array.ravel(), 0.6) if local else together
        assert done.masks[name].dtype == bool
        assert np.array_equal(done.masks[name], np.abs(array) >= limit)


def test_masks_of_some_layers_and_blocks() -> None:
    model = small()
    done = BACKEND.native(model, NativeRequest(MASKED, 0.5, ignored=("stem", "fc")), [IMAGES])
    assert set(done.masks) == {"inner.weight", "outer.weight", "dw.weight"}
    done = BACKEND.native(model, NativeRequest(MASKED, 0.5, options={"prune_params_type": "conv1x1_only"}), [IMAGES])
    assert set(done.masks) == {"outer.weight"}
    done = BACKEND.native(model, NativeRequest(MASKED, 0.5, options={"sparse_block": [2, 1]}), [IMAGES])
    mask = done.masks["inner.weight"]
    assert np.array_equal(mask[0::2], mask[1::2]) and 0 < mask.mean() < 1
    limited = NativeRequest(MASKED, 0.5, options={"mode": "threshold", "threshold": 0.7})
    done = BACKEND.native(model, limited, [IMAGES])
    assert np.array_equal(done.masks["fc.weight"], weights(model)["fc.weight"] >= np.float32(0.7))


def test_a_schedule_of_ones_own_ends_alike() -> None:
    model = small()
    configs = {"stable_iterations": 20, "pruning_iterations": 44, "tunning_iterations": 20, "pruning_steps": 3}
    done = BACKEND.native(model, NativeRequest(GRADUAL, 0.6, options={"configs": configs}), [IMAGES])
    plain = BACKEND.native(model, NativeRequest(MASKED, 0.6), [IMAGES])
    assert all(np.array_equal(done.masks[name], plain.masks[name]) for name in plain.masks)


def test_engines_are_listed_without_importing_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BACKEND.capabilities().native_engines == native.ENGINES
    monkeypatch.setattr(native, "find_spec", lambda name: None)
    assert BACKEND.capabilities().native_engines == ()
    level = logging.root.manager.disable
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        BACKEND.native(small(), NativeRequest(L1, 0.5), [IMAGES])
        BACKEND.native(small(), NativeRequest(MASKED, 0.5), [IMAGES])
    assert not caught and logging.root.manager.disable == level
    assert capfd.readouterr() == ("", "")


def test_sensitivities() -> None:
    """The metric counts what is left of a layer, so that the loss is the share of filters gone."""

    def left(model: Any) -> float:
        return float(model.inner.weight.shape[0])

    found = native.native_sensitivity(small(), [IMAGES], left, [0.1, 0.5], ["inner", "fc"])
    expected = {
        ratio: (6 - len(strongest(BACKEND.read(small())["inner.weight"], ratio))) / 6.001 for ratio in (0.1, 0.5)
    }
    assert found == {"inner": expected}
    with pytest.raises(BackendError, match=r"measures at 0.1, 0.2, .* not at 0.15"):
        native.native_sensitivity(small(), [IMAGES], left, [0.15], ["inner"])
