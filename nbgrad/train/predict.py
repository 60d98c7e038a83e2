"""Image files to classes: reading, resizing to what a model was trained on, probabilities."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nbgrad.autograd import Tensor, no_grad
from nbgrad.data import DataError
from nbgrad.nn import Module
from nbgrad.nn.functional import softmax

__all__ = ["Prediction", "predict", "read_image", "resize"]

Image = npt.NDArray[np.float64]
_MAX_PIXELS = 1 << 24       # 4096 × 4096: 400 MB as float64 RGB
_MAX_BYTES = 1 << 26
_LUMA = np.array([0.299, 0.587, 0.114])     # ITU-R BT.601


@dataclass(frozen=True)
class Prediction:
    """Probability of every class for one image."""

    path: str
    probabilities: npt.NDArray[np.float64]

    @property
    def label(self) -> int:
        return int(self.probabilities.argmax())


def predict(model: Module, paths: list[str], *, shape: tuple[int, int, int], mean: Any, std: Any,
            invert: bool = False) -> list[Prediction]:
    """Classify image files with a model trained on images of ``shape`` (C, H, W).

    Images are read as brightness 0..1, resized, and standardised as x̂ = (x − mean) / std per
    channel, like the training images were. ``invert``: 1 − x, for dark ink on light paper where the
    training images (as MNIST's and the digits') are light on dark.

    Raises FileNotFoundError, DataError for what is no readable image, and ValueError where the
    model's answer is not finite.
    """
    images = np.stack([fit(read_image(path), shape) for path in paths])
    images = 1.0 - images if invert else images
    dtype = next(iter(model.parameters())).dtype
    model.eval()
    with np.errstate(over="ignore", invalid="ignore"), no_grad():
        x = (images - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
        p = softmax(model(Tensor(x.astype(dtype))), 1).data.astype(np.float64)
    if not np.isfinite(p).all():
        raise ValueError("predict: the network's answer is not finite")
    return [Prediction(str(path), row) for path, row in zip(paths, p)]


def read_image(path: str) -> Image:
    """A .png or .npy file as (H, W, C) in 0..1, C 1 or 3; transparency is dropped.

    A .npy array is (H, W), (H, W, C) or (C, H, W): uint8 0..255, bool, or floating point 0..1.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if file.stat().st_size > _MAX_BYTES:
        raise DataError(path, f"holds {file.stat().st_size} bytes; at most {_MAX_BYTES} are read")
    readers = {".png": _read_png, ".npy": _read_npy}
    if file.suffix.lower() not in readers:
        raise DataError(path, "images are read from .png and .npy files")
    x = readers[file.suffix.lower()](file)
    x = x[:, :, None] if x.ndim == 2 else x
    if x.ndim == 3 and x.shape[2] not in (1, 2, 3, 4) and x.shape[0] in (1, 3):
        x = np.moveaxis(x, 0, 2)
    if x.ndim != 3 or x.shape[2] not in (1, 2, 3, 4) or not x.size:
        raise DataError(path, f"expected (H, W) or (H, W, 1 to 4 channels), got shape {x.shape}")
    x = x[:, :, :1 if x.shape[2] < 3 else 3].astype(np.float64)
    if not (np.isfinite(x).all() and x.min() >= 0 and x.max() <= 1):
        raise DataError(path, "expected values from 0 to 1 (or uint8)")
    return x


def fit(x: Image, shape: tuple[int, int, int]) -> Image:
    """(H, W, C) to the model's (C, H, W): grey to RGB or back, then resized."""
    channels, height, width = shape
    if x.shape[2] == 3 and channels == 1:
        x = x @ _LUMA[:, None]
    x = np.moveaxis(np.broadcast_to(x, (*x.shape[:2], channels)), 2, 0)    # (C, H, W)
    return resize(x, height, width)


def resize(x: Image, height: int, width: int) -> Image:
    """(..., H, W) to (..., height, width): bilinear; where it shrinks, the weights widen to an
    average over the area that a new pixel covers, so that thin strokes stay."""
    y: Image = _weights(x.shape[-2], height) @ x @ _weights(x.shape[-1], width).T
    return y


def _weights(n: int, m: int) -> Image:
    """(m, n): row i averages the n old pixels around new pixel i, weights 1 in all."""
    scale = n / m
    support = max(scale, 1.0)
    centre = (np.arange(m)[:, None] + 0.5) * scale - 0.5
    w: Image = np.maximum(0.0, 1.0 - np.abs(np.arange(n) - centre) / support)
    w /= w.sum(axis=1, keepdims=True)
    return w


def _read_png(path: Path) -> npt.NDArray[Any]:
    with open(path, "rb") as f:
        head = f.read(24)
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR" or len(head) < 24:
        raise DataError(path, "not a PNG file")
    width, height = struct.unpack(">II", head[16:24])
    _check_pixels(path, width * height)
    try:
        from matplotlib.image import imread
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("PNG files are read by matplotlib: pip install 'nbgrad[lab]'",
                                  name=e.name) from e
    try:
        return np.asarray(imread(path, format="png"))
    except (OSError, ValueError, SyntaxError, TypeError, IndexError, KeyError, EOFError,
            struct.error, OverflowError) as e:      # what Pillow raises, depending on the damage
        raise DataError(path, f"damaged PNG ({' '.join(str(e).split())})") from e


def _read_npy(path: Path) -> npt.NDArray[Any]:
    try:
        # Mapped, not read: a header that promises more than the file holds fails here.
        x = np.lib.format.open_memmap(path, mode="r")   # and a pickle is refused
    except (ValueError, OSError, EOFError, TypeError, SyntaxError, OverflowError, MemoryError) as e:
        raise DataError(path, f"not a readable .npy file ({' '.join(str(e).split())[:100]})") from e
    _check_pixels(path, x.size)
    if x.dtype == np.uint8:
        return x / 255.0
    if x.dtype.kind not in "bf":
        raise DataError(path, f"expected uint8, bool or floating point, got {x.dtype}")
    return np.array(x)


def _check_pixels(path: Path, pixels: int) -> None:
    if not 0 < pixels <= _MAX_PIXELS:
        raise DataError(path, f"{pixels} pixels; 1 to {_MAX_PIXELS} are read")
