"""Learning rate schedules: closed forms, and PyTorch's values."""

import json
import math

import numpy as np
import pytest

from nbgrad import nn, optim


def sgd(lrs=(0.5, 0.2), momentum=0.9, library=optim, parameter=lambda: nn.Parameter(np.ones(1))):
    return library.SGD([{"params": [parameter()], "lr": lr} for lr in lrs], momentum=momentum)


def rates(optimizer, schedule, steps):
    found = []
    for _ in range(steps):
        found.append([(g["lr"], g["momentum"] if "momentum" in g else g["betas"][0])
                      for g in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return np.array(found)


SCHEDULES = [
    ("StepLR", {"step_size": 3, "gamma": 0.5}),
    ("MultiStepLR", {"milestones": [2, 5, 5, 9]}),
    ("ExponentialLR", {"gamma": 0.9}),
    ("CosineAnnealingLR", {"T_max": 8, "eta_min": 0.01}),
    ("LinearLR", {"start_factor": 0.1, "end_factor": 0.7, "total_iters": 6}),
    ("ConstantLR", {"factor": 0.3, "total_iters": 4}),
    ("LambdaLR", {"lr_lambda": [lambda t: 0.9**t, lambda t: 1 / (1 + t)]}),
    ("OneCycleLR", {"max_lr": [1.0, 0.3], "total_steps": 20}),
    ("OneCycleLR", {"max_lr": 1.0, "epochs": 5, "steps_per_epoch": 4, "three_phase": True,
                    "anneal_strategy": "linear", "pct_start": 0.4}),
    ("OneCycleLR", {"max_lr": 1.0, "total_steps": 20, "cycle_momentum": False, "div_factor": 3.0}),
]


@pytest.mark.parametrize(("name", "settings"), SCHEDULES)
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_values_equal_pytorch(name, settings, kind):
    torch = pytest.importorskip("torch")
    both = []
    for library, p in ((optim, nn.Parameter(np.ones(1))), (torch.optim, torch.ones(1))):
        q = nn.Parameter(np.ones(1)) if library is optim else torch.ones(1)
        optimizer = getattr(library, kind)([{"params": [p]}, {"params": [q], "lr": 0.2}], lr=0.5)
        schedule = getattr(library.lr_scheduler, name)(optimizer, **settings)
        both.append(rates(optimizer, schedule, 20))
    np.testing.assert_allclose(both[0], both[1], rtol=1e-12, atol=1e-15)


def test_sequential_equals_pytorch():
    torch = pytest.importorskip("torch")
    both = []
    for library, parameter in ((optim, lambda: nn.Parameter(np.ones(1))),
                               (torch.optim, lambda: torch.ones(1))):
        optimizer = sgd(library=library, parameter=parameter)
        s = library.lr_scheduler
        parts = [s.LinearLR(optimizer, 0.1, total_iters=4), s.CosineAnnealingLR(optimizer, 9),
                 s.StepLR(optimizer, 2)]
        both.append(rates(optimizer, s.SequentialLR(optimizer, parts, [4, 12]), 20))
    np.testing.assert_allclose(both[0], both[1], rtol=1e-12, atol=1e-15)


def test_cosine_is_its_formula_and_the_first_value_applies_at_once():
    optimizer = sgd([1.0])
    schedule = optim.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.2)
    lrs = rates(optimizer, schedule, 11)[:, 0, 0]
    expected = [0.2 + 0.4 * (1 + math.cos(math.pi * t / 10)) for t in range(11)]
    np.testing.assert_allclose(lrs, expected, rtol=1e-14)


def test_warmup_rises_linearly_then_hands_over():
    optimizer = sgd([1.0])
    schedule = optim.warmup(optim.StepLR(optimizer, 2, 0.5), steps=4, start_factor=0.2)
    np.testing.assert_allclose(rates(optimizer, schedule, 9)[:, 0, 0],
                               [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.5, 0.5, 0.25], rtol=1e-14)


def test_one_cycle_peaks_where_momentum_is_lowest_and_then_stops():
    optimizer = sgd([0.1])
    schedule = optim.OneCycleLR(optimizer, max_lr=1.0, total_steps=11, pct_start=4 / 11)
    values = rates(optimizer, schedule, 11)[:, 0]
    assert values[:, 0].argmax() == values[:, 1].argmin() == 3
    assert values[3].tolist() == [1.0, 0.85]
    assert values[-1, 0] == pytest.approx(1 / 25e4)
    with pytest.raises(ValueError, match=r"Tried to step 12 times\. The specified number of total"):
        schedule.step()
    assert schedule.last_epoch == 11


def test_one_cycle_with_a_phase_of_one_step():
    optimizer = sgd([0.1])
    optim.OneCycleLR(optimizer, max_lr=1.0, total_steps=10, pct_start=0.1)
    assert optimizer.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("make", [
    lambda o: optim.StepLR(o, 3), lambda o: optim.OneCycleLR(o, 1.0, 20),
    lambda o: optim.warmup(optim.CosineAnnealingLR(o, 10), 5)])
def test_state_goes_through_json_and_resumes(make):
    optimizer = sgd()
    schedule = make(optimizer)
    rates(optimizer, schedule, 7)
    state = json.loads(json.dumps(schedule.state_dict()))
    other = sgd((0.01, 0.02))
    resumed = make(other)
    resumed.load_state_dict(state)
    other.load_state_dict(optimizer.state_dict())
    np.testing.assert_array_equal(rates(other, resumed, 8), rates(optimizer, schedule, 8))
    assert resumed.get_last_lr() == [g["lr"] for g in other.param_groups]


def test_bad_arguments_raise():
    optimizer = sgd()
    with pytest.raises(TypeError, match="int is not an Optimizer"):
        optim.StepLR(3, 1)
    with pytest.raises(ValueError, match="Expected positive integer step_size, but got 0"):
        optim.StepLR(optimizer, 0)
    with pytest.raises(KeyError, match="initial_lr"):
        optim.StepLR(optimizer, 2, last_epoch=3)
    with pytest.raises(ValueError, match="0 < start_factor"):
        optim.LinearLR(optimizer, 0.0)
    with pytest.raises(ValueError, match="lr_lambda must have the same length"):
        optim.LambdaLR(optimizer, [lambda t: 1.0])
    with pytest.raises(ValueError, match="either total_steps OR"):
        optim.OneCycleLR(optimizer, 1.0, epochs=3)
    with pytest.raises(ValueError, match="anneal_strategy must be one of"):
        optim.OneCycleLR(optimizer, 1.0, 10, anneal_strategy="sqrt")
    with pytest.raises(ValueError, match="pct_start"):
        optim.OneCycleLR(optimizer, 1.0, 10, pct_start=2.0)
    parts = [optim.StepLR(optimizer, 1), optim.StepLR(optimizer, 1)]
    with pytest.raises(ValueError, match="one more than the number of milestone points"):
        optim.SequentialLR(optimizer, parts, [])
    with pytest.raises(ValueError, match="belong to the optimizer given"):
        optim.SequentialLR(sgd(), parts, [3])
    with pytest.raises(ValueError, match="the state has 1 groups, the optimizer 2"):
        parts[0].load_state_dict({"base_lrs": [1.0], "last_epoch": 0})
