"""Samples to batches, against PyTorch."""

from collections import namedtuple

import numpy as np
import pytest

import nbgrad
from nbgrad.data import DataLoader, TensorDataset, default_collate

Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "batch",
    [
        [1, 2], [1.5, 2.5], [True, False], ["a", "b"], [b"a", b"b"], [(1, "a"), (2, "b")],
        [{"a": 1, "b": [1.0, 2]}, {"a": 3, "b": [2.0, 4]}], [Point(1, 2.0), Point(3, 4.0)],
        [np.float32(1), np.float32(2)], [np.ones((2, 3)), np.zeros((2, 3))],
    ],
)
def test_default_collate_does_as_pytorch(batch):
    torch = pytest.importorskip("torch")

    def same(a, b):
        assert type(a).__name__ == type(b).__name__
        if isinstance(a, nbgrad.Tensor):
            assert np.array_equal(a.numpy(), b.numpy())
            assert a.numpy().dtype == b.numpy().dtype
        elif isinstance(a, dict):
            assert a.keys() == b.keys()
            [same(a[key], b[key]) for key in a]
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b)
            [same(x, y) for x, y in zip(a, b)]
        else:
            assert a == b

    same(default_collate(batch), torch.utils.data.default_collate(batch))


def test_default_collate_keeps_the_graph():
    x = nbgrad.tensor([1.0, 2.0, 3.0], requires_grad=True)
    for (batch,) in DataLoader(TensorDataset(x), 2):
        (batch * batch).sum().backward()
    assert x.grad.tolist() == [2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        ([np.zeros(2), np.zeros(3)], ValueError),
        ([nbgrad.tensor([0.0]), nbgrad.tensor([[0.0]])], ValueError),
        ([(1, 2), (1,)], ValueError),
        ([object()], TypeError),
    ],
)
def test_default_collate_refuses_what_does_not_stack(batch, error):
    with pytest.raises(error, match="default_collate"):
        default_collate(batch)
