"""Datasets by name."""

from __future__ import annotations

from nbgrad.data import prepare
from nbgrad.data.cifar import cifar10
from nbgrad.data.dataset import TensorDataset
from nbgrad.data.digits import digits
from nbgrad.data.files import Path_
from nbgrad.data.idx import mnist

NAMES = ("digits", "mnist", "cifar10")


def load(
    name: str, root: Path_ | None = None, *, standardize: bool = False
) -> tuple[TensorDataset, TensorDataset]:
    """(train, test) of the dataset `name`: "digits" (needs no files), "mnist" or "cifar10".

    `root` is the folder of the files. With `standardize`, each channel has mean 0 and std 1 over
    the training images.

    Raises:
        ValueError: an unknown name, or no root where one is needed.
        FileNotFoundError: naming the files looked for.
        DataError: a damaged file.

    >>> train, test = load("digits")
    >>> len(train), len(test)
    (1437, 360)
    """
    if name not in NAMES:
        raise ValueError(f"unknown dataset {name!r}; there are {', '.join(NAMES)}")
    if name == "digits":
        train, test = digits()
    elif root is None:
        raise ValueError(f"dataset {name!r} needs root, the folder of its files")
    else:
        read = {"mnist": mnist, "cifar10": cifar10}[name]
        train, test = read(root, "train"), read(root, "test")
    return prepare.standardize(train, test) if standardize else (train, test)
