"""Training on the device and on the CPU: the same losses, step by step; and as a captured step."""

import math
from functools import partial
from time import monotonic

import numpy as np

import nbgrad
from nbgrad import models, nn, optim

# A step multiplies roundings by what the network's loss is curved: 20 steps of float32 stay within
# 2 %, and in float64 within 1e-8. (name, image, batch, steps, dtype, of the loss)
RUNS = [("lenet", (1, 28, 28), 64, 20, "float64", 1e-8), ("lenet", (1, 28, 28), 64, 20, "float32",
                                                          2e-2),
        ("resnet20", (3, 32, 32), 32, 5, "float64", 1e-6), ("resnet20", (3, 32, 32), 32, 10,
                                                            "float32", 5e-2)]
TINY = [("lenet", (1, 8, 8), 2, 2, "float64", 1e-8)]


def losses(name, image, batch, steps, dtype, device, until=math.inf):
    """The loss of each step of SGD with momentum on random images, of those before ``until``."""
    rng, kind = np.random.default_rng(0), np.dtype(dtype)
    nbgrad.manual_seed(1)
    how = {"image_size": image[-1]} if name == "lenet" else {}
    model = getattr(models, name)(**how).to(dtype=kind).to(device)
    step, found = optim.SGD(model.parameters(), 0.02, momentum=0.9), []
    x = nbgrad.tensor(rng.standard_normal((batch, *image)).astype(kind), device=device)
    t = nbgrad.tensor(rng.integers(0, 10, batch), device=device)
    for _ in range(steps):
        if monotonic() > until:
            break
        step.zero_grad()
        loss = nn.functional.cross_entropy(model(x), t)
        loss.backward()
        step.step()
        found.append(loss.item())
    return np.array(found)


def _compare(report, case, name, image, batch, steps, dtype, close):
    want, got = (losses(name, image, batch, steps, dtype, d, report.deadline)
                 for d in ("cpu", "cuda"))
    if len(got) < steps:
        report.add("train", case, "skipped", note=f"out of time after {len(got)} steps")
        return
    apart = float(np.max(np.abs(got - want) / np.abs(want)))
    assert apart <= close, f"losses differ by {apart:.3g} of theirs: cuda {got}, cpu {want}"
    assert steps < 5 or got[-1] < got[0], f"the loss does not fall: {got}"
    report.add("train", case, value=apart, unit="rel", note=f"allowed {close:g}")


def replayed(captured, steps, width):
    """The loss of each step of AdamW with dropout on random numbers, as replays or eagerly."""
    nbgrad.manual_seed(1)
    model = models.mlp(width, (width,), dropout=0.5).to("cuda")
    optimizer = optim.AdamW(model.parameters(), 0.01, capturable=True)
    x = nbgrad.zeros(16, width, device="cuda")
    t = nbgrad.tensor(np.arange(16) % 10, device="cuda")

    def once():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), t)
        loss.backward()
        optimizer.step()
        return loss
    run, found = nbgrad.cuda.graph(once, warmup=2) if captured else once, []
    for _ in range(steps):
        x.copy_(nbgrad.randn(16, width))
        found.append(run().item())
    return np.array(found)


def _replays(report, case, steps, width):
    want, got = (replayed(captured, steps, width) for captured in (False, True))
    assert (got == want).all(), f"replays {got}, eager steps {want}"
    report.add("train", case, value=0.0, unit="rel", note="allowed 0")


def cases(report, simulate):
    """(name, comparison)."""
    for run in TINY if simulate else RUNS:
        case = f"{run[0]} {run[4]}, {run[3]} steps of {run[2]}"
        yield case, partial(_compare, report, case, *run)
    steps, width = (4, 6) if simulate else (20, 256)
    case = f"captured AdamW with dropout, {steps} steps"
    yield case, partial(_replays, report, case, steps, width)
