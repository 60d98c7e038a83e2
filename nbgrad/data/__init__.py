"""Datasets, and the loader that makes batches of them."""

from nbgrad.data.catalog import NAMES, load
from nbgrad.data.cifar import cifar10
from nbgrad.data.collate import default_collate
from nbgrad.data.dataset import Dataset, Subset, TensorDataset, random_split
from nbgrad.data.digits import digits, load_digits
from nbgrad.data.files import DataError
from nbgrad.data.idx import fashion_mnist, mnist, read_idx
from nbgrad.data.loader import DataLoader
from nbgrad.data.prepare import channel_statistics, standardize

__all__ = [
    "Dataset",
    "TensorDataset",
    "Subset",
    "random_split",
    "DataLoader",
    "default_collate",
    "load",
    "NAMES",
    "digits",
    "load_digits",
    "mnist",
    "fashion_mnist",
    "read_idx",
    "cifar10",
    "standardize",
    "channel_statistics",
    "DataError",
]
