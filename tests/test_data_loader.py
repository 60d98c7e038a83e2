"""DataLoader: order, batches and threads."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import nbgrad
from nbgrad import cuda
from nbgrad.data import DataLoader, Dataset, Subset, TensorDataset, default_collate
from nbgrad.data.prefetch import Prefetch


class Squares(Dataset):
    """Slow samples, the early ones slowest, so that threads finish out of order."""

    def __init__(self, n, fail_at=None):
        self.n, self.fail_at, self.seen = n, fail_at, []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.seen.append(i)
        if i == self.fail_at:
            raise KeyError(f"sample {i}")
        time.sleep(0.002 if i % 4 == 0 else 0)
        return np.float32(i * i), {"index": i}


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("nbgrad-data")]


def rows(loader):
    return [batch[0].tolist() for batch in loader]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    assert threads() == []


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("n", [0, 1, 6, 7])
def test_batches_in_order_are_those_of_pytorch(n, drop_last):
    torch = pytest.importorskip("torch")
    x, y = np.random.default_rng(0).standard_normal((n, 2)), np.arange(n)
    loader = DataLoader(TensorDataset(x, y), batch_size=3, drop_last=drop_last)
    tensors = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    expected = list(torch.utils.data.DataLoader(tensors, batch_size=3, drop_last=drop_last))
    got = list(loader)
    assert len(loader) == len(got) == len(expected)
    for batch, other in zip(got, expected):
        assert isinstance(batch, list)
        for t, u in zip(batch, other):
            assert np.array_equal(t.numpy(), u.numpy())
            assert t.numpy().dtype == u.numpy().dtype


def test_shuffled_epochs_are_permutations_drawn_from_the_generator():
    generator = nbgrad.Generator(5)
    loader = DataLoader(TensorDataset(np.arange(10)), 4, shuffle=True, generator=generator)
    reference = nbgrad.Generator(5)
    for _ in range(3):
        order = nbgrad.randperm(10, generator=reference).tolist()
        assert rows(loader) == [order[:4], order[4:8], order[8:]]
        assert sorted(order) == list(range(10))


def test_the_default_generator_gives_the_order():
    loader = DataLoader(TensorDataset(np.arange(20)), 20, shuffle=True)
    nbgrad.manual_seed(1)
    first = rows(loader)
    nbgrad.manual_seed(1)
    assert rows(loader) == first == [nbgrad.randperm(20, generator=nbgrad.Generator(1)).tolist()]
    assert rows(loader) != first


def test_a_sampler_gives_the_order():
    loader = DataLoader(TensorDataset(np.arange(10)), 2, sampler=[9, 9, 1, -1, 3])
    assert rows(loader) == [[9, 9], [1, 9], [3]]
    assert len(loader) == 3


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_give_the_same_batches_in_the_same_order(workers):
    def epochs(n):
        generator = nbgrad.Generator(0)
        loader = DataLoader(Squares(50), 3, shuffle=True, generator=generator, num_workers=n)
        return [(x.tolist(), d["index"].tolist()) for _ in range(2) for x, d in loader]

    assert epochs(workers) == epochs(0)
    assert sorted(i for _, index in epochs(workers) for i in index) == sorted([*range(50)] * 2)


def test_tensor_datasets_are_indexed_once_per_batch(monkeypatch):
    x = np.random.default_rng(0).standard_normal((12, 3, 2)).astype(np.float32)
    strided = np.asfortranarray(x)
    nested = Subset(Subset(TensorDataset(x, strided), range(11, 0, -1)), [0, 4, 2, 10, 9])
    expected = x[[11, 7, 9, 1, 2]]
    slow = list(DataLoader(nested, 2, collate_fn=default_collate))
    monkeypatch.delattr(TensorDataset, "__getitem__")
    fast = list(DataLoader(nested, 2))
    for batches in (slow, fast):
        for column in range(2):
            together = np.concatenate([batch[column].numpy() for batch in batches])
            assert np.array_equal(together, expected)


def test_a_batch_is_a_copy():
    x = np.zeros((4, 2))
    (batch,) = next(iter(DataLoader(TensorDataset(x), 4)))
    with nbgrad.no_grad():
        batch.fill_(7.0)
    assert not x.any()


def test_a_subclass_of_tensor_dataset_is_asked_for_its_samples():
    class Doubled(TensorDataset):
        def __getitem__(self, i):
            return (super().__getitem__(i)[0] * 2,)

    assert rows(DataLoader(Doubled(np.arange(3.0)), 3)) == [[0.0, 2.0, 4.0]]


def test_collate_fn_gets_the_samples():
    loader = DataLoader(["a", "b", "c"], 2, collate_fn="".join)
    assert list(loader) == ["ab", "c"]
    assert list(DataLoader(["a", "b", "c"], 2)) == [["a", "b"], ["c"]]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_at_its_batch_and_ends_the_epoch(workers):
    iterator = iter(DataLoader(Squares(40, fail_at=10), 4, num_workers=workers))
    assert [next(iterator)[1]["index"].tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(KeyError, match="sample 10") as caught:
        next(iterator)
    assert any(entry.name == "__getitem__" for entry in caught.traceback)
    assert list(iterator) == []
    assert threads() == []


def test_stopping_early_ends_the_threads():
    for _ in DataLoader(Squares(100), 2, num_workers=3):
        assert len(threads()) == 3
        break
    assert threads() == []


def test_dropping_loader_and_iterator_ends_the_threads():
    iterator = iter(DataLoader(Squares(100), 2, num_workers=2))
    next(iterator)
    assert len(threads()) == 2
    cycle = [iterator]
    cycle.append(cycle)
    del iterator, cycle
    gc.collect()
    assert threads() == []


def test_threads_run_ahead_by_a_bounded_number_of_batches():
    dataset = Squares(400)
    iterator = iter(DataLoader(dataset, 4, num_workers=2, prefetch=3))
    next(iterator)
    time.sleep(0.2)
    assert len(dataset.seen) == 4 * (1 + 2 * 3)
    iterator.close()


def test_no_job_starts_after_closing():
    started = []

    def fetch(job):
        started.append(job)
        time.sleep(0.02)
        return job

    iterator = Prefetch(fetch, range(100), workers=1, ahead=20)
    assert next(iterator) == 0
    iterator.close()
    assert threads() == []
    assert len(started) <= 2
    assert list(iterator) == []


def test_a_thread_keeps_no_batch_alive():
    iterator = Prefetch(np.arange, [3, 4], workers=1, ahead=2)
    batches = [next(iterator), next(iterator)]
    assert [batch.tolist() for batch in batches] == [[0, 1, 2], [0, 1, 2, 3]]
    alive = [weakref.ref(batch) for batch in batches]
    assert len(threads()) == 1  # waiting for more
    time.sleep(0.05)
    del batches
    assert all(ref() is None for ref in alive)
    assert list(iterator) == []


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("seconds", [0.01, 60])
def test_ctrl_c_ends_the_process_even_if_a_sample_hangs(seconds):
    code = f"""if True:
        import signal, time
        from nbgrad.data import DataLoader

        signal.signal(signal.SIGINT, signal.default_int_handler)   # ignored in the background

        class Slow:
            def __len__(self): return 10**6
            def __getitem__(self, i):
                time.sleep({seconds})
                return i

        print("ready", flush=True)
        for batch in DataLoader(Slow(), 2, num_workers=2):
            pass
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode != 0


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0}, {"batch_size": 1.5}, {"batch_size": True}, {"num_workers": -1},
        {"prefetch": 0}, {"shuffle": True, "sampler": [0]},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="DataLoader"):
        DataLoader([1, 2], **settings)


@pytest.mark.skipif(cuda.is_available(), reason="a GPU is there")
@pytest.mark.parametrize("workers", [0, 2])
def test_pin_memory_without_a_gpu_warns_and_changes_nothing(workers):
    loader = DataLoader(TensorDataset(np.arange(5)), 2, pin_memory=True, num_workers=workers)
    with pytest.warns(UserWarning, match="no accelerator is found, .* device 'cuda' "):
        assert [b.tolist() for (b,) in loader] == [[0, 1], [2, 3], [4]]


def test_a_dataset_needs_length_and_samples():
    with pytest.raises(TypeError, match="got generator"):
        DataLoader(i for i in range(3))
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (Dataset,), {"__len__": lambda self: 1})()
