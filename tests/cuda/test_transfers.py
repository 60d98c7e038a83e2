"""Copies between host and device, on the simulated device and on a stand-in for CuPy."""

from collections import namedtuple
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from nbgrad.kernels.cuda import memory

import nbgrad
from nbgrad import cuda, nn, tensor
from nbgrad.data import DataLoader, TensorDataset, default_collate

X = np.arange(24, dtype="f4").reshape(2, 3, 4)
LAID_OUT = {"C": X, "channels-last": np.moveaxis(np.moveaxis(X, 1, -1).copy(), -1, 1),
            "strided": X[:, ::2], "0-d": X[0, 0, 0].reshape(()), "empty": X[:0]}


@pytest.mark.parametrize("layout", LAID_OUT)
@pytest.mark.parametrize("dtype", ["float32", "int64", "float16", "bool"])
def test_pinned_memory_has_the_same_values_and_order(layout, dtype):
    x = tensor(LAID_OUT[layout].astype(dtype, order="K"))
    y = x.pin_memory()
    np.testing.assert_array_equal(y.numpy(), x.numpy())
    assert (y.dtype, y.device) == (x.dtype, "cpu")
    assert memory.order_of(y.data) == memory.order_of(x.data)
    if x.numel():
        assert not x.is_pinned()
        assert y.is_pinned()
        assert y.pin_memory() is y
        assert y.detach()[..., None].is_pinned()             # a view of it
    assert y.data.flags.writeable


@pytest.mark.parametrize("layout", LAID_OUT)
def test_what_is_copied_later_is_there_after_synchronize(layout):
    x = tensor(LAID_OUT[layout]).pin_memory()
    on_device = x.to("cuda", non_blocking=True)
    assert on_device.device == "cuda"
    back = on_device.to("cpu", non_blocking=True)
    if x.numel():
        assert back.is_pinned()
        assert np.isnan(back.numpy()).all()                  # too early
    cuda.synchronize()
    np.testing.assert_array_equal(back.numpy(), x.numpy())
    assert memory.order_of(back.data) == memory.order_of(x.data) or layout == "strided"


def test_a_copy_to_the_host_has_the_values_of_its_turn():
    x = tensor(X, device="cuda")
    back = x.to("cpu", non_blocking=True)
    x.zero_()
    assert x.cpu().sum().item() == 0                         # waits, for the one before as well
    np.testing.assert_array_equal(back.numpy(), X)


def test_gradients_modules_and_writes_take_non_blocking():
    x = tensor(X).pin_memory().requires_grad_()
    (x.to("cuda", non_blocking=True) * 2).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), np.full_like(X, 2))
    model = nn.Linear(4, 2).to("cuda", non_blocking=True)
    want = model.weight.detach().cpu().numpy()
    model.to("cpu", non_blocking=True)
    cuda.synchronize()
    np.testing.assert_array_equal(model.weight.detach().numpy(), want)
    there = nbgrad.zeros(2, 3, 4, device="cuda").copy_(tensor(X).pin_memory(), non_blocking=True)
    here = nbgrad.zeros(2, 3, 4).copy_(there, non_blocking=True)
    np.testing.assert_array_equal(here.numpy(), X)


def test_pinning_refuses_what_is_on_a_device():
    with pytest.raises(RuntimeError, match="cannot pin a tensor on 'cuda'"):
        tensor(X, device="cuda").pin_memory()
    assert not tensor(X, device="cuda").is_pinned()


def test_the_array_interface_is_the_devices(monkeypatch):
    """As PyTorch: no such attribute on the CPU, so that hasattr() is false there."""
    there = {"shape": (2, 3, 4), "typestr": "<f4", "data": (4096, False), "version": 3}
    monkeypatch.setattr(memory.Array, "__cuda_array_interface__", there, raising=False)
    x = tensor(X, device="cuda")
    assert x.__cuda_array_interface__ is there
    assert not hasattr(tensor(X), "__cuda_array_interface__")
    with pytest.raises(AttributeError, match=r"on non-CUDA tensor; use Tensor\.to\('cuda'\) first"):
        tensor(X).__cuda_array_interface__  # noqa: B018
    with pytest.raises(RuntimeError, match=r"requires grad.*use Tensor\.detach\(\)"):
        x.requires_grad_().__cuda_array_interface__  # noqa: B018
    assert x.detach().__cuda_array_interface__ is there


def test_tensors_of_other_libraries_device_memory():
    """In the same memory, also where no device has been asked for."""
    class Foreign(np.ndarray):
        __cuda_array_interface__ = None
    there = np.arange(6, dtype="f4").view(Foreign)
    x = nbgrad.as_tensor(there)
    assert (x.device, x.dtype, x.tolist()) == ("cuda", nbgrad.float32, [0, 1, 2, 3, 4, 5])
    x.mul_(2)
    assert there[1] == 2
    y = tensor(there, dtype=nbgrad.float64)
    assert (y.device, y.dtype) == ("cuda", nbgrad.float64)
    y.zero_()
    assert there[1] == 2
    with pytest.raises(TypeError, match="complex"):
        nbgrad.as_tensor(np.zeros(2, "c8").view(Foreign))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_pins_its_batches(workers):
    x = np.arange(10, dtype="f4").reshape(5, 2)
    for loader in (DataLoader(TensorDataset(x, np.arange(5)), 2, pin_memory=True,
                              num_workers=workers),
                   DataLoader([*zip(x, range(5))], 2, pin_memory=True, num_workers=workers)):
        batches = list(loader)
        assert all(part.is_pinned() for batch in batches for part in batch)
        np.testing.assert_array_equal(np.concatenate([b[0].numpy() for b in batches]), x)
        assert [n for b in batches for n in b[1].tolist()] == list(range(5))


def test_a_loader_pins_within_what_collate_makes():
    Pair = namedtuple("Pair", "x names")
    Own = type("Own", (), {"pin_memory": lambda self: "pinned by itself"})
    rows = [Pair({"a": tensor([float(i)])}, "n") for i in range(2)]
    loader = DataLoader(rows, 2, pin_memory=True,
                        collate_fn=lambda samples: (default_collate(samples), Own(), 7))
    (batch, own, seven), = loader
    assert type(batch) is Pair
    assert batch.x["a"].is_pinned()
    assert batch.x["a"].tolist() == [[0.0], [1.0]]
    assert (own, seven, batch.names) == ("pinned by itself", 7, ("n", "n"))


class Block(bytearray):
    """CuPy's pinned memory."""


class Cupy:
    """Notes what copies ask of CuPy; events are done when the test says so."""

    def __init__(self):
        self.done, self.asked = False, []
        asked, cupy = self.asked, self

        class Event:
            def __init__(self, disable_timing):
                assert disable_timing

            def record(self):
                asked.append("recorded")

            @property
            def done(self):
                return cupy.done

        class Array(np.ndarray):
            device = nullcontext()

            def set(self, x):
                asked.append("set")
                self[...] = x

            def get(self, out, blocking):
                assert not blocking
                asked.append("get")
                out[...] = self
        self.Array = Array
        self.cuda = SimpleNamespace(
            Event=Event, Device=self.on, PinnedMemoryPointer=Block,
            alloc_pinned_memory=Block, memory=SimpleNamespace(OutOfMemoryError=MemoryError),
            get_current_stream=lambda: SimpleNamespace(
                synchronize=lambda: asked.append("waited")))

    def on(self, number):
        self.asked.append(f"device {number}")
        return nullcontext()

    def empty(self, shape, dtype):
        return np.empty(shape, dtype).view(self.Array)


@pytest.fixture
def cupy(monkeypatch):
    cupy = Cupy()
    monkeypatch.setattr(memory, "xp", cupy)
    monkeypatch.setattr(memory, "SIMULATED", False)
    monkeypatch.setattr(memory, "_flying", [])
    return cupy


def test_pinned_memory_is_kept_until_its_copy_is_done(cupy):
    x = memory.pin(X)
    y = memory.to_device(x, 0, non_blocking=True)
    np.testing.assert_array_equal(y, X)
    assert cupy.asked == ["device 0", "set", "recorded"]
    host = memory.to_host(y.transpose(0, 2, 1), non_blocking=True)
    np.testing.assert_array_equal(host, X.transpose(0, 2, 1))
    assert memory.is_pinned(host)
    held = [a for _, arrays in memory._flying for a in arrays]
    assert any(a is x for a in held)
    assert any(a is host for a in held)
    cupy.done = True
    memory.to_device(x, 0, non_blocking=True)
    assert len(memory._flying) == 1                          # the last one's; the others are done


def test_blocking_copies_of_pinned_memory_wait(cupy):
    """CuPy's set() returns before pinned memory has been read."""
    memory.to_device(memory.pin(X), 0)
    assert cupy.asked == ["device 0", "set", "waited"]
    cupy.asked.clear()
    memory.to_device(X, 0, non_blocking=True)                # CUDA copies it aside at once
    assert cupy.asked == ["device 0", "set"]
    assert memory._flying == []


def test_the_current_device(cupy):
    cupy.cuda.runtime = SimpleNamespace(getDevice=lambda: 1, getDeviceCount=lambda: 2)
    with cuda.device("cuda"), cuda.device(0):
        pass
    assert cupy.asked == ["device 0", "device 0"]
    assert cuda.current_device() == 1
    cuda.device("cuda:1")
    assert cupy.asked[2:] == ["device 1"]
    for device, says in (("cuda:2", "2 CUDA devices"), ("cpu", "is no GPU"), (-1, "is not there")):
        with pytest.raises(RuntimeError, match=says):
            cuda.device(device)
