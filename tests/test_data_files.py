"""IDX, MNIST and CIFAR-10 files against the definitions of their formats."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from nbgrad import data
from nbgrad.data import DataError

CODES = {"u1": 0x08, "i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}
_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"
MNIST = Path(os.environ.get("NBGRAD_MNIST", _SHARED))


def idx_bytes(x: np.ndarray) -> bytes:
    """The IDX file of an array, written from the format's description."""
    big = x.astype(x.dtype.newbyteorder(">"))
    code = CODES[big.dtype.str.lstrip("|")]
    return struct.pack(f">BBBB{x.ndim}i", 0, 0, code, x.ndim, *x.shape) + big.tobytes()


def write_mnist(root: Path, prefix: str, n: int, seed: int, *, packed: bool = False):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, n, dtype=np.uint8)
    for name, x in (("images-idx3", images), ("labels-idx1", labels)):
        raw = idx_bytes(x)
        path = root / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(raw) if packed else raw)
    return images, labels


def write_cifar(folder: Path, records: int = 3) -> dict[str, np.ndarray]:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    files = {}
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        files[name] = rng.integers(0, 256, (records, 3073), dtype=np.uint8)
        files[name][:, 0] %= 10
        (folder / name).write_bytes(files[name].tobytes())
    return files


def arrays(dataset):
    return [t.numpy() for t in dataset.tensors]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (1, 2, 1, 2, 1, 2, 1, 2), (0, 5)])
@pytest.mark.parametrize("dtype", list(CODES))
def test_read_idx_gives_back_what_was_written(tmp_path, dtype, shape, packed):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) * 100).astype(dtype)
    path = tmp_path / "x"
    path.write_bytes(gzip.compress(idx_bytes(x)) if packed else idx_bytes(x))
    y = data.read_idx(path)
    assert np.array_equal(y, x)
    assert y.shape == shape
    assert y.dtype == np.dtype(dtype).newbyteorder("=")
    assert y.flags.writeable


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_reads_both_splits(tmp_path, name, packed):
    written = {
        "train": write_mnist(tmp_path, "train", 20, 0, packed=packed),
        "test": write_mnist(tmp_path, "t10k", 10, 1, packed=packed),
    }
    for split, dataset in zip(written, data.load(name, tmp_path)):
        images, labels = arrays(dataset)
        expected = (written[split][0][:, None] / 255.0).astype(np.float32)
        assert np.array_equal(images, expected)
        assert np.array_equal(labels, written[split][1])
        assert (images.dtype, labels.dtype) == (np.float32, np.int64)


def test_mnist_splits_the_t10k_pair_where_it_is_alone(tmp_path):
    images, labels = write_mnist(tmp_path, "t10k", 50, 0)
    order = sorted(range(50), key=lambda i: labels[i])
    test = sorted(order[::5])
    train = sorted(set(range(50)) - set(test))
    for split, rows in (("train", train), ("test", test)):
        x, y = arrays(data.mnist(tmp_path, split=split))
        assert np.array_equal(x[:, 0] * np.float32(255), images[rows].astype(np.float32))
        assert np.array_equal(y, labels[rows])


@pytest.mark.skipif(not MNIST.is_dir(), reason="no MNIST here (NBGRAD_MNIST names its folder)")
def test_real_mnist():
    train, test = data.load("mnist", MNIST)
    whole = data.read_idx(next(MNIST.glob("t10k-images-idx3-ubyte*")))
    if len(train) == 8000:  # the t10k pair alone
        together = sum(np.round(arrays(part)[0] * 255.0).sum() for part in (train, test))
        assert together == whole.sum()
        counts = np.array([980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])
        in_train, in_test = (np.bincount(arrays(part)[1]) for part in (train, test))
        assert np.array_equal(in_train + in_test, counts)
        assert np.abs(in_test - counts / 5).max() < 1
    assert arrays(test)[0].shape[1:] == (1, 28, 28)
    assert whole.shape == (10000, 28, 28)
    # the published numbers: mean and standard deviation of the t10k pixels
    assert abs(whole.mean() / 255 - 0.1325) < 1e-4
    assert abs(whole.std() / 255 - 0.3105) < 1e-4


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin"])
def test_cifar10_reads_the_binary_version(tmp_path, folder):
    files = write_cifar(tmp_path / folder)
    expected = {"test": files.pop("test_batch.bin"), "train": np.concatenate([*files.values()])}
    for split, dataset in zip(("train", "test"), data.load("cifar10", tmp_path)):
        images, labels = arrays(dataset)
        assert np.array_equal(labels, expected[split][:, 0])
        for record, image in zip(expected[split], images):
            for channel in range(3):  # a plane of 1024 per colour, rows of 32
                plane = record[1 + 1024 * channel :][:1024].reshape(32, 32)
                assert np.array_equal(image[channel], (plane / 255.0).astype(np.float32))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"fashion_mnist: missing train.* https://github"):
        data.load("fashion_mnist", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*train-labels-idx1"):
        data.load("mnist", tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        data.load("mnist", tmp_path / "nowhere")
    write_mnist(tmp_path, "t10k", 5, 0)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing t10k-labels-idx1-ubyte in"):
        data.mnist(tmp_path, "test")
    write_cifar(tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing data_batch_4\.bin in .*cifar-10-binary"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("read", [data.mnist, data.fashion_mnist, data.cifar10])
def test_unknown_splits_are_refused(tmp_path, read):
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'val'"):
        read(tmp_path, "val")


def test_data_error_is_a_value_error_that_names_its_file(tmp_path):
    (tmp_path / "x").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=rf"^{tmp_path / 'x'}: not an IDX file"):
        data.read_idx(tmp_path / "x")
    assert issubclass(DataError, ValueError)
