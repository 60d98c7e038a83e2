"""Datasets, splits, standardisation and the digits: values against NumPy."""

import hashlib

import numpy as np
import pytest

import nbgrad
from nbgrad import data


def arrays(dataset):
    return [t.numpy() for t in dataset.tensors]


def test_digits_are_the_uci_test_set():
    images, labels = data.load_digits()
    assert images.dtype == np.float32
    assert labels.dtype == np.int64
    points = images.numpy().astype(np.float64) * 16
    assert np.array_equal(points, np.round(points))
    raw = points.astype(np.uint8).tobytes() + labels.numpy().astype(np.uint8).tobytes()
    digest = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
    assert hashlib.sha256(raw).hexdigest() == digest
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(labels.numpy()).tolist() == counts
    assert points[0, 0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]  # the first row of UCI's file


def test_the_digits_split_is_fixed_balanced_and_complete():
    (x, y), (x_test, y_test) = map(arrays, data.digits())
    images, labels = (t.numpy() for t in data.load_digits())
    test = sorted(sorted(range(1797), key=lambda i: labels[i])[::5])
    assert np.array_equal(x_test, images[test])
    assert np.array_equal(y_test, labels[test])
    train = [i for i in range(1797) if i not in set(test)]
    assert np.array_equal(x, images[train])
    assert np.array_equal(y, labels[train])
    assert (len(train), len(test)) == (1437, 360)
    assert np.abs(np.bincount(y_test) - np.bincount(labels) / 5).max() < 1


def test_tensor_dataset_samples_are_rows():
    x, y = np.arange(12.0).reshape(4, 3), np.arange(4)
    dataset = data.TensorDataset(nbgrad.tensor(x), y)
    assert len(dataset) == 4
    assert [t.tolist() for t in dataset[-1]] == [[9.0, 10.0, 11.0], 3]
    assert [t.tolist() for t in dataset[1:3]] == [x[1:3].tolist(), [1, 2]]
    assert np.shares_memory(dataset.tensors[1].numpy(), y)
    with pytest.raises(IndexError):
        dataset[4]


@pytest.mark.parametrize("shapes", [[(3, 2), (4,)], [()], []])
def test_tensor_dataset_refuses_tensors_of_different_length(shapes):
    with pytest.raises(ValueError, match="Size mismatch between tensors"):
        data.TensorDataset(*[np.zeros(shape) for shape in shapes])


def test_subset_takes_the_given_rows_in_order():
    outer = data.Subset(data.TensorDataset(np.arange(10) * 10), [7, 1, -1, 1])
    inner = data.Subset(outer, np.array([3, 0]))
    assert [row.item() for (row,) in outer] == [70, 10, 90, 10]
    assert [row.item() for (row,) in inner] == [10, 70]
    assert outer[1:3][0].tolist() == [10, 90]
    assert data.Subset(["a", "b"], [1])[0] == "b"
    assert len(data.Subset(["a"], [])) == 0


@pytest.mark.parametrize(
    ("indices", "error"),
    [([2], IndexError), ([-3], IndexError), ([0.5], TypeError), ([[0]], TypeError)],
)
def test_subset_refuses_rows_that_are_not_there(indices, error):
    with pytest.raises(error, match="Subset"):
        data.Subset(["a", "b"], indices)


@pytest.mark.parametrize("lengths", [[7, 3], [0.7, 0.3], [0.35, 0.35, 0.3], [1 / 3] * 3, [1.0]])
def test_random_split_has_the_lengths_of_pytorch(lengths):
    torch = pytest.importorskip("torch")
    parts = data.random_split(list(range(10)), lengths, generator=nbgrad.Generator(0))
    expected = torch.utils.data.random_split(list(range(10)), lengths)
    assert [len(part) for part in parts] == [len(part) for part in expected]
    assert sorted(i for part in parts for i in part) == list(range(10))


def test_random_split_follows_its_generator():
    dataset = data.TensorDataset(np.arange(100))

    def split(generator):
        return [part.indices.tolist() for part in data.random_split(dataset, [60, 40], generator)]

    order = nbgrad.randperm(100, generator=nbgrad.Generator(3)).tolist()
    assert split(nbgrad.Generator(3)) == [order[:60], order[60:]]
    nbgrad.manual_seed(3)
    assert split(None) == [order[:60], order[60:]]
    assert split(nbgrad.Generator(4)) != [order[:60], order[60:]]


@pytest.mark.parametrize("lengths", [[5, 4], [11, -1], [4.5, 5.5], [], [0.5, 0.6], [1.5, -0.5]])
def test_random_split_refuses_lengths_that_do_not_fit(lengths):
    with pytest.raises(ValueError, match="random_split"):
        data.random_split(list(range(10)), lengths)


def test_random_split_warns_of_an_empty_part():
    with pytest.warns(UserWarning, match="Length of split at index 1 is 0"):
        data.random_split([1, 2], [2, 0])


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_standardize_uses_the_statistics_of_train(offset):
    rng = np.random.default_rng(0)
    scale = np.array([1.0, 30.0, 1e-3])[:, None, None]
    x = (rng.standard_normal((2100, 3, 4, 5)) * scale + offset).astype(np.float32)
    x_test = x[:70] * np.float32(1.5)
    train, test = data.standardize(
        data.TensorDataset(x, np.arange(2100)), data.TensorDataset(x_test, np.arange(70))
    )
    wide = x.astype(np.float64)
    mean, std = wide.mean((0, 2, 3), keepdims=True), wide.std((0, 2, 3), keepdims=True)
    if offset:  # the third channel is constant in float32: 1e6 + 1e-3 is 1e6
        mean[0, 2], std[0, 2] = 1e6, 1.0
    got = data.channel_statistics(data.TensorDataset(x))
    np.testing.assert_allclose(got[0], mean.ravel(), rtol=1e-12)
    np.testing.assert_allclose(got[1], std.ravel(), rtol=1e-9)
    for dataset, source in ((train, x), (test, x_test)):
        expected = (source.astype(np.float64) - mean) / std
        np.testing.assert_allclose(arrays(dataset)[0], expected, rtol=1e-6, atol=1e-7)
        assert arrays(dataset)[0].dtype == np.float32
        assert np.array_equal(arrays(dataset)[1], np.arange(len(source)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_standardize_maps_a_constant_channel_to_zero(dtype):
    x = np.full((1000, 2, 3), 0.1, dtype)  # a float64 sum of 0.1 rounds: the mean is not 0.1
    x[:, 1] = np.arange(3)
    (train_x,), (test_x,) = map(arrays, data.standardize(*[data.TensorDataset(x)] * 2))
    assert np.array_equal(train_x[:, 0], np.zeros((1000, 3)))
    np.testing.assert_allclose(test_x[0, 1], np.array([-1, 0, 1]) / np.sqrt(2 / 3), rtol=1e-6)


def test_standardize_takes_subsets_and_changes_nothing():
    x = np.arange(24.0).reshape(6, 4)
    whole = data.TensorDataset(x, np.arange(6))
    rows, labels = arrays(data.standardize(data.Subset(whole, [5, 1, 3]), whole)[0])
    expected = (x[[5, 1, 3]] - x[[5, 1, 3]].mean(0)) / x[[5, 1, 3]].std(0)
    np.testing.assert_allclose(rows, expected, rtol=1e-12)
    assert labels.tolist() == [5, 1, 3]
    assert np.array_equal(x, np.arange(24.0).reshape(6, 4))


@pytest.mark.parametrize(
    ("x", "x_test", "error"),
    [
        (np.zeros((2, 3), int), np.zeros((2, 3)), TypeError),
        (np.zeros(2), np.zeros(2), ValueError),
        (np.zeros((0, 3)), np.zeros((2, 3)), ValueError),
        (np.zeros((2, 3)), np.zeros((2, 1)), ValueError),
        (np.full((2, 3), np.nan), np.zeros((2, 3)), ValueError),
        (np.array([[1.0], [np.inf]]), np.zeros((2, 1)), ValueError),
    ],
)
def test_standardize_refuses_what_has_no_statistics(x, x_test, error):
    with pytest.raises(error, match="standardize"):
        data.standardize(data.TensorDataset(x), data.TensorDataset(x_test))


def test_standardize_needs_tensors():
    with pytest.raises(TypeError, match="got list"):
        data.standardize([1.0], [2.0])


def test_load_standardizes_on_request():
    train, test = data.load("digits", standardize=True)
    plain = data.digits()
    expected = data.standardize(*plain)
    assert np.array_equal(arrays(train)[0], arrays(expected[0])[0])
    assert np.array_equal(arrays(test)[0], arrays(expected[1])[0])
    assert abs(arrays(train)[0].mean(dtype=np.float64)) < 1e-6
    assert abs(arrays(train)[0].std(dtype=np.float64) - 1) < 1e-6


def test_load_names_the_datasets_there_are():
    with pytest.raises(ValueError, match="'imagenet'; there are digits, mnist, fashion_mnist, c"):
        data.load("imagenet")
    for name, place in (("mnist", "ossci-datasets"), ("fashion_mnist", "zalandoresearch"),
                        ("cifar10", r"cifar-10-binary\.tar\.gz")):
        with pytest.raises(ValueError, match=f"'{name}' needs root, .* https://.*{place}"):
            data.load(name)
