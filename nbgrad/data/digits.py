"""The digits that come with nbgrad: 1,797 images of 8 × 8 pixels, enough to train on in seconds."""

from __future__ import annotations

from importlib import resources

import numpy as np

from nbgrad.autograd import Tensor, as_tensor
from nbgrad.data.dataset import TensorDataset
from nbgrad.data.prepare import every_fifth, scaled


def load_digits() -> tuple[Tensor, Tensor]:
    """Images float32 (1797, 1, 8, 8) in 0..1 and labels int64 (1797,), in the file's order.

    The test set of "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998, UCI,
    doi:10.24432/C50P49, CC BY 4.0): pixel = inked points of a 4 × 4 block, 0..16, here over 16.

    >>> images, labels = load_digits()
    >>> images.shape, labels[:5].tolist()
    ((1797, 1, 8, 8), [0, 1, 2, 3, 4])
    """
    path = resources.files("nbgrad.data") / "digits.npz"
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    return as_tensor(scaled(images[:, None], 16)), as_tensor(labels.astype(np.int64))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """(train, test) of 1,437 and 360 digits: sorted by label (stably), every fifth is test.

    The split is fixed and balanced to within one image per class. The same 13 writers are in both,
    so the accuracy says less about new writers than UCI's own split of 43 does.
    """
    images, labels = load_digits()
    rows = every_fifth(labels.data)
    train, test = (
        TensorDataset(as_tensor(images.data[rows[split]]), as_tensor(labels.data[rows[split]]))
        for split in ("train", "test")
    )
    return train, test
