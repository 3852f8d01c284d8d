"""The zoo: names, mathematics and initial weights, against paddle.vision, torchvision's naming and published counts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimbridge import zoo
from slimbridge.discovery import get_backend
from slimbridge.errors import ModelError
from slimbridge.parity import relative, tolerance
from slimbridge.zoo.mobilenet_v2 import rounded

SMALL = ("mobilenet_v1_small", "mobilenet_v2_small", "resnet18_small", "resnet50_small", "vgg11_small")
MOBILENET_V3 = ("mobilenet_v3_small", "mobilenet_v3_large")
VGG = ("vgg11", "vgg16")
LARGE = ("lenet", "mobilenet_v1", "mobilenet_v2", *MOBILENET_V3, "resnet18", "resnet50", *VGG)


@pytest.fixture(scope="module")
def torch_side() -> Any:
    pytest.importorskip("torch")
    return get_backend("torch")


@pytest.fixture(scope="module")
def paddle_side() -> Any:
    pytest.importorskip("paddle")
    return get_backend("paddle")


def images(channels: int, side: int, n: int = 2) -> Any:
    return np.random.default_rng(5).standard_normal((n, channels, side, side)).astype(np.float32)


def output(backend: Any, model: Any, x: Any) -> Any:
    return backend.ops.numpy(backend.forward(model, [x]).output)


def norm(path: str) -> Iterator[str]:
    yield from (f"{path}.{role}" for role in ("weight", "bias", "running_mean", "running_var"))


def resnet_names(depths: tuple[int, ...], convolutions: int) -> Iterator[str]:
    """torchvision's state_dict, by its rule: a downsample where a stage begins and the shape changes."""
    yield "conv1.weight"
    yield from norm("bn1")
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            path = f"layer{stage}.{block}"
            for index in range(1, convolutions + 1):
                yield f"{path}.conv{index}.weight"
                yield from norm(f"{path}.bn{index}")
            if block == 0 and (stage > 1 or convolutions == 3):
                yield f"{path}.downsample.0.weight"
                yield from norm(f"{path}.downsample.1")
    yield from ("fc.weight", "fc.bias")


def mobilenet_v2_names() -> Iterator[str]:
    """torchvision's state_dict: 17 blocks, the first without an expansion, between a stem and a last convolution."""
    for index in range(19):
        path = f"features.{index}"
        if index in (0, 18):
            convolutions, bare = [path], ""
        else:
            convolutions = [f"{path}.conv.{i}" for i in range(1 if index == 1 else 2)]
            bare = f"{path}.conv.{len(convolutions)}"
        for convolution in convolutions:
            yield f"{convolution}.0.weight"
            yield from norm(f"{convolution}.1")
        if bare:
            yield f"{bare}.weight"
            yield from norm(f"{path}.conv.{len(convolutions) + 1}")
    yield from ("classifier.1.weight", "classifier.1.bias")


@pytest.mark.parametrize("suffix", ["", "_small"])
@pytest.mark.parametrize(
    ("name", "expected", "count"),
    [
        ("resnet18", tuple(resnet_names((2, 2, 2, 2), 2)), 102),
        ("resnet50", tuple(resnet_names((3, 4, 6, 3), 3)), 267),
        ("mobilenet_v2", tuple(mobilenet_v2_names()), 262),
    ],
)
def test_names_are_torchvisions(torch_side: Any, name: str, expected: tuple[str, ...], count: int, suffix: str) -> None:
    assert len(expected) == count
    assert set(torch_side.read(zoo.build(name + suffix, torch_side, width=8))) == set(expected)


@pytest.mark.parametrize("name", [name for name in LARGE if name not in VGG])
def test_paddle_vision_takes_the_weights_and_gives_the_same(paddle_side: Any, name: str) -> None:
    import paddle

    item = zoo.entry(name)
    theirs = getattr(paddle.vision.models, "LeNet" if name == "lenet" else name)(num_classes=7)
    ours = zoo.build(name, paddle_side, num_classes=7)
    paddle_side.write(theirs, paddle_side.read(ours))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = images(item.in_channels, 28 if name == "lenet" else 64, n=1)
    expected = output(paddle_side, theirs, x)
    assert np.abs(output(paddle_side, ours, x) - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "column"), [("vgg11", "A"), ("vgg16", "D")])
def test_paddle_vision_takes_narrow_vggs(paddle_side: Any, name: str, column: str) -> None:
    """Their features and an eighth of their width: 130 million weights take seconds to draw."""
    from paddle import nn
    from paddle.vision.models import vgg

    theirs = vgg.VGG(vgg.make_layers([c if c == "M" else c // 8 for c in vgg.cfgs[column]]), num_classes=0)
    hidden = (nn.Linear(64 * 49, 512), nn.ReLU(), nn.Dropout(), nn.Linear(512, 512), nn.ReLU(), nn.Dropout())
    theirs.num_classes, theirs.classifier = 7, nn.Sequential(*hidden, nn.Linear(512, 7))
    ours = zoo.build(name, paddle_side, num_classes=7, width=8)
    paddle_side.write(theirs, paddle_side.read(ours))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = images(3, 64, n=1)
    expected = output(paddle_side, theirs, x)
    assert np.abs(output(paddle_side, ours, x) - expected).max() <= 1e-6 * np.abs(expected).max()


# Trainable parameters as published: torchvision's model table (1,000 classes), Keras's for MobileNet, and LeNet
# by hand: 60 + 2,416 + 48,120 + 10,164 + 850.
PUBLISHED = {
    "lenet": (10, 61_610),
    "mobilenet_v1": (1000, 4_231_976),
    "mobilenet_v2": (1000, 3_504_872),
    "mobilenet_v3_small": (1000, 2_542_856),
    "mobilenet_v3_large": (1000, 5_483_032),
    "resnet18": (1000, 11_689_512),
    "resnet50": (1000, 25_557_032),
    "vgg11": (1000, 132_863_336),
    "vgg16": (1000, 138_357_544),
}


@pytest.mark.parametrize("name", LARGE)
def test_parameter_counts_are_the_published_ones(torch_side: Any, name: str) -> None:
    import torch

    classes, expected = PUBLISHED[name]
    item = zoo.entry(name)
    with torch.device("meta"):  # shapes without memory: VGG has 138 million entries
        model = item.builder(torch_side.nn, classes, item.in_channels, **item.options)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("name", [*SMALL, "lenet", "mobilenet_v2", "resnet18"])
def test_both_frameworks_start_from_the_same_bits_and_agree(torch_side: Any, paddle_side: Any, name: str) -> None:
    item = zoo.entry(name)
    models = [zoo.build(name, side, num_classes=5, seed=3) for side in (torch_side, paddle_side)]
    left, right = (side.read(model) for side, model in zip((torch_side, paddle_side), models, strict=True))
    assert set(left) == set(right)
    for path, array in left.items():
        assert array.dtype == right[path].dtype == np.float32
        assert np.array_equal(array, right[path]), path
    x = images(item.in_channels, min(item.image_size, 64))
    a, b = output(torch_side, models[0], x), output(paddle_side, models[1], x)
    assert a.shape == (2, 5)
    assert np.abs(a - b).max() < 1e-5 * max(1.0, np.abs(a).max())
    # A signal that died on the way would agree too.
    assert np.abs(a[0] - a[1]).max() > 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_small_models_take_images_of_several_sizes(torch_side: Any, name: str) -> None:
    model = zoo.build(name, torch_side, in_channels=1, width=8)
    for side in (8, 16, 28, 32):
        assert output(torch_side, model, images(1, side)).shape == (2, 10)


def test_lenet_is_built_for_the_side_it_is_told(torch_side: Any) -> None:
    model = zoo.build("lenet", torch_side, in_channels=3, image_size=32)
    assert output(torch_side, model, images(3, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", [*SMALL, "mobilenet_v1", "mobilenet_v2", *MOBILENET_V3, "resnet18", "resnet50", *VGG])
def test_width_is_the_first_convolutions(torch_side: Any, name: str) -> None:
    wide, narrow = (torch_side.read(zoo.build(name, torch_side, width=width)) for width in (16, 8))
    first = next(path for path in wide if wide[path].ndim == 4)
    assert (wide[first].shape[0], narrow[first].shape[0]) == (16, 8)


def test_multiples_of_eight_are_the_papers() -> None:
    # Channels of MobileNetV2 1.4, 0.75 and 0.35 in the published checkpoints.
    assert [rounded(1.4 * c) for c in (32, 16, 24, 64, 320, 1280)] == [48, 24, 32, 88, 448, 1792]
    assert [rounded(0.75 * c) for c in (32, 16, 24, 96)] == [24, 16, 24, 72]
    assert [rounded(0.35 * c) for c in (32, 16, 24, 32, 64, 96)] == [16, 8, 8, 16, 24, 32]


def test_initial_weights_follow_their_rules() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "conv.weight": (64, 32, 3, 3),
        "conv.bias": (64,),
        "depthwise.weight": (4096, 1, 3, 3),
        "fc.weight": (50, 400),
        "fc.bias": (50,),
        **{f"bn.{role}": (64,) for role in ("weight", "bias", "running_mean", "running_var")},
    }
    arrays = zoo.initial_weights(shapes, seed=1)
    assert {name: array.shape for name, array in arrays.items()} == shapes
    for name, fan in (("conv.weight", 64 * 9), ("depthwise.weight", 9)):
        draws = arrays[name]
        # The standard error of the standard deviation of n normal draws, as a share of it, is 1 / sqrt(2 n).
        allowed = tolerance("sampling").value / np.sqrt(2 * draws.size)
        assert draws.std() == pytest.approx(np.sqrt(2 / fan), rel=allowed)
    for name, fan_in in (("conv.bias", 32 * 9), ("fc.weight", 400), ("fc.bias", 400)):
        bound = 1 / np.sqrt(fan_in)
        assert 0.85 * bound < np.abs(arrays[name]).max() <= bound
        # The fourth moment of uniform draws is 9/5 of the squared second: a standard error of 1 / sqrt(5 n).
        allowed = tolerance("sampling").value / np.sqrt(5 * arrays[name].size)
        assert arrays[name].std() == pytest.approx(bound / np.sqrt(3), rel=allowed)
    assert [arrays[f"bn.{role}"].tolist() == [value] * 64 for role, value in
            (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1))] == [True] * 4  # fmt: skip


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (8, 4), "b.weight": (8, 4)}
    both = zoo.initial_weights(shapes, 0)
    assert not np.array_equal(both["a.weight"], both["b.weight"])
    assert np.array_equal(both["b.weight"], zoo.initial_weights({"b.weight": (8, 4)}, 0)["b.weight"])
    assert not np.array_equal(both["a.weight"], zoo.initial_weights(shapes, 1)["a.weight"])


def test_initial_weights_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ModelError, match=r"no rule for 'cell\.gate' of shape \(3,\)"):
        zoo.initial_weights({"cell.gate": (3,)}, 0)


def test_a_built_model_is_independent_of_the_frameworks_seed(torch_side: Any) -> None:
    first, second = torch_side.read(zoo.build("lenet", torch_side)), torch_side.read(zoo.build("lenet", torch_side))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("framework", ["torch", "paddle"])
def test_a_copy_is_independent(framework: str, request: pytest.FixtureRequest) -> None:
    side = request.getfixturevalue(f"{framework}_side")
    model = zoo.build("mobilenet_v2_small", framework, width=8)
    before = side.read(model)
    copy = side.clone(model)
    side.write(copy, {"classifier.1.bias": np.ones(10, np.float32)}, partial=True)
    assert all(np.array_equal(before[name], array) for name, array in side.read(model).items())
    x = images(3, 8)
    shift = output(side, copy, x) - output(side, model, x)
    assert np.abs(shift - (1 - before["classifier.1.bias"])).max() < 1e-5


def test_a_pytorch_model_can_be_saved_whole(torch_side: Any, tmp_path: Path) -> None:
    import torch

    model = zoo.build("resnet18_small", torch_side, width=8)
    torch.save(model, tmp_path / "model.pt")
    # A process of its own has joined no class yet.
    code = (
        "import sys, numpy, torch; model = torch.load(sys.argv[1], weights_only=False).eval();"
        "numpy.save(sys.argv[2], model(torch.tensor(numpy.load(sys.argv[3]))).detach().numpy())"
    )
    x = images(3, 8)
    np.save(tmp_path / "x.npy", x)
    paths = [str(tmp_path / name) for name in ("model.pt", "y.npy", "x.npy")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)
    assert relative(np.load(paths[1]), output(torch_side, model, x)) <= tolerance("forward").value


def test_entries_describe_themselves() -> None:
    assert tuple(sorted(zoo.models())) == tuple(sorted((*SMALL, *LARGE)))
    for name, item in zoo.models().items():
        assert item.name == name
        assert item.doc
        assert item.paper
        assert item.image_size == (28 if name == "lenet" else 8 if name in SMALL else 224)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet81", {}, r"zoo model 'resnet81' is unknown \(did you mean 'resnet18'\?\)"),
        ("resnet18", {"widht": 8}, r"option 'widht' is unknown \(did you mean 'width'\?\); allowed: width"),
        ("resnet18", {"width": 0}, "width must be an integer of at least 1, found 0"),
        ("resnet18", {"width": 8.0}, "width must be an integer"),
        ("resnet18", {"num_classes": 0}, "num_classes must be an integer of at least 1, found 0"),
        ("resnet18", {"num_classes": True}, "num_classes"),
        ("lenet", {"in_channels": -1}, "in_channels must be an integer of at least 1, found -1"),
        ("lenet", {"image_size": 11}, "image_size must be at least 12, found 11"),
        ("mobilenet_v2", {"width": 12}, "width must be a multiple of 8, found 12"),
        ("mobilenet_v3_small", {"width": 12}, "mobilenet_v3_small': width must be a multiple of 8, found 12"),
        ("mobilenet_v2", {"dropout": 1.0}, "dropout must be a number in 0 <= x < 1, found 1.0"),
    ],
)
def test_build_refuses(torch_side: Any, name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        zoo.build(name, torch_side, **arguments)
    assert "\n" not in str(caught.value)


def test_importing_the_zoo_and_the_tasks_loads_no_framework() -> None:
    code = "import sys, slimbridge.zoo, slimbridge.tasks; print({'torch', 'paddle'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
