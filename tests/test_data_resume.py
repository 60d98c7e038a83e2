"""DataLoader: its state, and going on from it."""

import json

import numpy as np
import pytest

import nbgrad
from nbgrad.data import DataLoader, TensorDataset


def rows(loader):
    return [batch[0].tolist() for batch in loader]


def train(loader, start, stop, log, drop):
    """Batches start to stop of a run that, as dropout does, draws from the default generator."""
    step = start
    while step < stop:
        for (x,) in loader:
            noise = nbgrad.rand(2).tolist() if drop else None
            log.append((x.tolist(), noise))
            step += 1
            if step == stop:
                return loader.state_dict(), nbgrad.get_rng_state()
    raise AssertionError("unreachable")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [1, 3, 4, 6])  # 4 batches per epoch: also exactly at an epoch's end
def test_training_resumes_bitwise_in_the_middle_of_an_epoch(own, workers, at):
    def loader():
        generator = nbgrad.Generator(7) if own else None
        dataset = TensorDataset(np.arange(11))
        return DataLoader(dataset, 3, shuffle=True, generator=generator, num_workers=workers)

    nbgrad.manual_seed(0)
    whole = []
    train(loader(), 0, 11, whole, True)
    nbgrad.manual_seed(0)
    parts = []
    saved = json.loads(json.dumps(train(loader(), 0, at, parts, True)))
    nbgrad.manual_seed(99)
    resumed = loader()
    nbgrad.set_rng_state(saved[1])
    resumed.load_state_dict(saved[0])
    assert resumed.state_dict() == saved[0]
    train(resumed, at, 11, parts, True)
    assert parts == whole


def test_the_state_counts_epochs_and_batches():
    loader = DataLoader(TensorDataset(np.arange(6)), 2)
    seen = []
    for _ in range(2):
        for _ in loader:
            state = loader.state_dict()
            seen.append((state["epoch"], state["position"]))
    assert seen == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (2, 0)
    first = iter(loader)
    next(first)
    list(loader)
    list(first)  # the iterator that was overtaken no longer counts
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (3, 0)


def test_loading_a_state_overtakes_an_iterator_that_is_under_way():
    loader = DataLoader(TensorDataset(np.arange(6)), 2)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    loader.load_state_dict(state)
    assert [batch[0].tolist() for batch in iterator] == [[2, 3], [4, 5]]
    assert loader.state_dict() == state
    assert rows(loader) == [[2, 3], [4, 5]]


def test_a_different_order_is_refused_on_resuming():
    dataset = TensorDataset(np.arange(6))
    state = {}
    loader = DataLoader(dataset, 2, sampler=[5, 4, 3, 2, 1, 0])
    for _ in loader:
        state = loader.state_dict()
        break
    same = DataLoader(dataset, 2, sampler=[5, 4, 3, 2, 1, 0])
    same.load_state_dict(state)
    assert rows(same) == [[3, 2], [1, 0]]
    other = DataLoader(dataset, 2, sampler=[0, 4, 3, 2, 1, 5])
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="order of this epoch is not the one that was saved"):
        iter(other)


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1}, {"epoch": "0"}, {"position": None}, {"position": 99}, {"position": True},
        {"samples": 5}, {"batch_size": 3}, {"generator": None}, {"generator": {}},
        {"epoch_start": None}, {"epoch_start": {"seed": 1}}, {"order": -4},
    ],
)
def test_a_bad_state_is_refused_and_changes_nothing(change):
    loader = DataLoader(TensorDataset(np.arange(6)), 2, shuffle=True, generator=nbgrad.Generator(0))
    next(iter(loader))
    before = loader.state_dict()
    with pytest.raises((ValueError, TypeError, KeyError)):
        loader.load_state_dict({**before, **change})
    assert loader.state_dict() == before
