"""Four models for studying normalization: an MLP, a plain CNN, LeNet-5 and the ResNet-20 of
CIFAR-10.

``norm`` is a name of ``nn.create_norm``, None, or a function of the shape (C) or (C, H, W) of the
maps that makes the layer, and ``placement`` says where it stands: "before" the activation (Ioffe &
Szegedy 2015), "after" it, or, in the ResNet, "preact" (before the layer: He et al. 2016b). "layer"
and "rms" take each sample as a whole; "instance" needs images, so that the ResNet and the CNN alone
take it. ``dropout_at`` says which of a layer's values are dropped: "each"
(those behind each activation), "before" (the inputs of each norm, or what stands where it would) or
"last" (those behind the last activation).
The layers of ``mlp``, ``cnn`` and ``lenet`` keep their bias, which is PyTorch's default, although
batch normalization that follows directly takes it out again (its gradient is zero to rounding); the
ResNet's convolutions have none, as in torchvision.
"""

# mypy: no-warn-return-any

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nbgrad import nn, ops
from nbgrad.autograd import Tensor
from nbgrad.nn.fusion import convolved, led, normalized

__all__ = ["BasicBlock", "ResNet", "cnn", "create", "lenet", "mlp", "resnet20"]

Norm = str | Callable[[tuple[int, ...]], nn.Module] | None
DROPOUTS = ("each", "before", "last")

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "softplus": nn.Softplus, "identity": nn.Identity,
}


def mlp(in_features: int = 64, hidden: Sequence[int] = (100, 100, 100), num_classes: int = 10, *,
        activation: str = "relu", norm: Norm = "batch", placement: str = "before",
        dropout: float = 0.0, dropout_at: str = "each") -> nn.Sequential:
    """Fully connected layers; three of 100 units are those of Ioffe & Szegedy 2015, section 4.1.

    x: (N, in_features) or any (N, …) of that many values.  y: (N, num_classes) scores

    >>> list(mlp(4, hidden=[3]).state_dict())[:3]
    ['fc1.weight', 'fc1.bias', 'norm1.weight']
    """
    _choose("mlp", "placement", placement, ("before", "after"))
    _choose("mlp", "dropout_at", dropout_at, DROPOUTS)
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    width = in_features
    for i, units in enumerate(hidden, 1):
        layers[f"fc{i}"] = nn.Linear(width, units)
        own = _around(str(i), activation, norm, placement, (units,))
        layers |= _dropped(own, i, i == len(hidden), dropout, dropout_at)
        width = units
    layers[f"fc{len(hidden) + 1}"] = nn.Linear(width, num_classes)
    return nn.Sequential(layers)


def lenet(in_channels: int = 1, num_classes: int = 10, image_size: int = 28, *,
          activation: str = "relu", norm: Norm = "batch", placement: str = "before",
          dropout: float = 0.0, dropout_at: str = "each") -> nn.Sequential:
    """LeNet-5 (LeCun et al. 1998): two convolutions (6 and 16 channels), each with 2 × 2 pooling,
    and three linear layers (120, 84, num_classes); max pooling and ReLU instead of its averages and
    tanh.

    x: (N, in_channels, image_size, image_size).  5 × 5 kernels, the first padded so that 28 × 28
    gives the paper's 5 × 5 map before the linear layers; images below 16 pixels get padded 3 × 3
    kernels (8 × 8 gives a 2 × 2 map). Dropout is for the linear layers alone. Raises
    ValueError for images below 4 pixels.
    """
    _choose("lenet", "placement", placement, ("before", "after"))
    _choose("lenet", "dropout_at", dropout_at, DROPOUTS)
    if image_size < 4:
        raise ValueError(f"lenet: image_size must be at least 4, got {image_size}")
    around = partial(_around, activation=activation, norm=norm, placement=placement)
    kernel, pads = (3, (1, 1)) if image_size < 16 else (5, (2, 0))
    layers: dict[str, nn.Module] = {}
    channels, size = in_channels, image_size
    for i, (width, pad) in enumerate(zip((6, 16), pads), 1):
        layers[f"conv{i}"] = nn.Conv2d(channels, width, kernel, padding=pad)
        size += 2 * pad - kernel + 1
        layers |= around(str(i), shape=(width, size, size))
        layers[f"pool{i}"] = nn.MaxPool2d(2)
        channels, size = width, size // 2
    layers["flatten"] = nn.Flatten()
    width = channels * size * size
    for i, units in enumerate((120, 84), 3):
        layers[f"fc{i}"] = nn.Linear(width, units)
        layers |= _dropped(around(str(i), shape=(units,)), i, i == 4, dropout, dropout_at)
        width = units
    layers["fc5"] = nn.Linear(width, num_classes)
    return nn.Sequential(layers)


def cnn(in_channels: int = 1, num_classes: int = 10, image_size: int = 28, depth: int = 4,
        width: int = 16, *, activation: str = "relu", norm: Norm = "batch",
        placement: str = "before", dropout: float = 0.0, dropout_at: str = "each"
        ) -> nn.Sequential:
    """``depth`` 3 × 3 convolutions, of ``width`` channels at first; behind every second one, while
    there are 4 × 4 pixels or more, 2 × 2 max pooling and from then on twice the channels; mean over
    the image; one linear layer.

    x: (N, in_channels, image_size, image_size).
    """
    _choose("cnn", "placement", placement, ("before", "after"))
    _choose("cnn", "dropout_at", dropout_at, DROPOUTS)
    layers: dict[str, nn.Module] = {}
    channels, size = in_channels, image_size
    for i in range(1, depth + 1):
        layers[f"conv{i}"] = nn.Conv2d(channels, width, 3, padding=1)
        own = _around(str(i), activation, norm, placement, (width, size, size))
        layers |= _dropped(own, i, i == depth, dropout, dropout_at)
        channels = width
        if i % 2 == 0 and size >= 4:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
            size, width = size // 2, 2 * width
    layers |= {"mean": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    layers[f"fc{depth + 1}"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)


def resnet20(in_channels: int = 3, num_classes: int = 10, width: int = 16, image_size: int = 32, *,
             activation: str = "relu", norm: Norm = "batch", placement: str = "before",
             dropout: float = 0.0) -> ResNet:
    """ResNet-20 in its CIFAR form (He et al. 2016, section 4.2): a 3 × 3 convolution, three stages
    of three blocks with ``width``, 2 and 4 times as many channels, mean over the image, one linear
    layer.

    x: (N, in_channels, image_size, image_size).  Shortcuts are the paper's option A: stride and
    zero channels, no parameters; 269,722 parameters with the defaults. Convolutions are initialised
    with He's normal (fan_out). ``image_size`` matters to norm="layer" and "rms" alone; ``dropout``
    acts before the last layer.
    """
    return ResNet(in_channels, num_classes, width, image_size, blocks=3, activation=activation,
                  norm=norm, placement=placement, dropout=dropout)


class BasicBlock(nn.Module):
    """y = φ(x' + F(x)), F two 3 × 3 convolutions, x' the shortcut.

    before: conv norm φ conv norm, + x', φ.  after: conv φ norm conv, + x', φ norm.
    preact: norm φ conv norm φ conv, + x' (He et al. 2016b).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, size: int, *,
                 activation: str, norm: Norm, placement: str) -> None:
        super().__init__()
        self.stride, self.extra, self.placement = stride, channels - in_channels, placement
        first = size * stride if placement == "preact" else size
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.norm1 = _norm(norm, (in_channels if placement == "preact" else channels, first, first))
        self.conv2 = _conv3x3(channels, channels, 1)
        self.norm2 = _norm(norm, (channels, size, size))
        self.act = _activation(activation)

    def shortcut(self, x: Tensor) -> Tensor:
        """Every stride-th pixel, and zeros in the channels that x does not have."""
        if self.stride > 1:
            x = x[:, :, ::self.stride, ::self.stride]
        if self.extra:
            x = ops.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return x

    def forward(self, x: Tensor) -> Tensor:
        short, act = self.shortcut(x), self.act
        if self.placement == "preact":
            h = convolved(self.conv1, self.norm2, act, normalized(self.norm1, act, x))
            return short + self.conv2(h)
        if self.placement == "after":
            return self.norm2(act(short + self.conv2(self.norm1(act(self.conv1(x))))))
        h = convolved(self.conv1, self.norm1, act, x)
        return convolved(self.conv2, self.norm2, act, h, short)


class ResNet(nn.Module):
    """Three stages of ``blocks`` blocks each; see ``resnet20``."""

    def __init__(self, in_channels: int, num_classes: int, width: int, image_size: int,
                 blocks: int, *, activation: str, norm: Norm, placement: str,
                 dropout: float) -> None:
        super().__init__()
        _choose("resnet", "placement", placement, ("before", "after", "preact"))
        last = 4 * width
        size = image_size
        self.conv1 = _conv3x3(in_channels, width, 1)
        around = _around("1", activation, norm, placement, (width, size, size))
        self.stem = nn.Sequential({} if placement == "preact" else around)
        self.stages = nn.Sequential()
        block = partial(BasicBlock, activation=activation, norm=norm, placement=placement)
        channels = width
        for stage, first in enumerate((1, 2, 2)):
            size = (size - 1) // first + 1
            for i in range(blocks):
                self.stages.append(block(channels, width << stage, 1 if i else first, size))
                channels = width << stage
        around = _around("2", activation, norm, placement, (last, size, size))
        self.head = nn.Sequential(around if placement == "preact" else {})
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.stages(led(self.conv1, self.stem, x)))
        return self.fc(self.dropout(ops.flatten(self.pool(x), 1)))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp, "cnn": cnn, "lenet": lenet, "resnet20": resnet20}


def create(name: str, **options: Any) -> nn.Module:
    """A model by name. Raises ValueError for a name that is not one of MODELS.

    >>> create("mlp", in_features=2, hidden=(), num_classes=3)
    Sequential(
      (flatten): Flatten(start_dim=1, end_dim=-1)
      (fc1): Linear(in_features=2, out_features=3, bias=True)
    )
    """
    _choose("create", "name", name, tuple(MODELS))
    return MODELS[name](**options)


def _around(number: str, activation: str, norm: Norm, placement: str,
            shape: tuple[int, ...]) -> dict[str, nn.Module]:
    """Normalization and activation in their order, under the names of their layer."""
    norms = {} if norm is None else {f"norm{number}": _norm(norm, shape)}
    act = {f"act{number}": _activation(activation)}
    return {**act, **norms} if placement == "after" else {**norms, **act}


def _dropped(layers: dict[str, nn.Module], number: int, last: bool, dropout: float,
             where: str) -> dict[str, nn.Module]:
    """A layer's norm and activation, with dropout where it belongs."""
    if not dropout or (where == "last" and not last):
        return layers
    items, own = list(layers.items()), (f"dropout{number}", nn.Dropout(dropout))
    names = [name for name, _ in items]
    norm = f"norm{number}"
    at = len(items) if where != "before" else names.index(norm) if norm in names else 0
    return dict([*items[:at], own, *items[at:]])


def _norm(norm: Norm, shape: tuple[int, ...]) -> nn.Module:
    """For maps of this shape (C) or (C, H, W)."""
    if callable(norm):
        return norm(shape)
    return nn.create_norm(norm, shape[0], size=shape[1:])


def _activation(name: str) -> nn.Module:
    _choose("models", "activation", name, tuple(ACTIVATIONS))
    return ACTIVATIONS[name]()


def _conv3x3(in_channels: int, channels: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _choose(owner: str, what: str, value: Any, names: tuple[Any, ...]) -> None:
    if value not in names:
        choices = ", ".join(map(repr, names))
        raise ValueError(f"{owner}: {what} must be one of {choices}, got {value!r}")
