"""Does batch norm belong before or after the activation?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nbgrad.lab.arms import accuracies, bars, edges, grouped, percent, points, tuned
from nbgrad.lab.intervals import bootstrap, paired, together
from nbgrad.lab.judging import BY_MEAN, corrected, differs
from nbgrad.lab.study import Cell, Figure, Finding, Record, Study, Table
from nbgrad.lab.training import configured, train

NETWORKS: dict[str, dict[str, Any]] = {
    "MLP": {"model": "mlp", "depth": 4, "batch_size": 60},
    "CNN": {"model": "cnn", "depth": 4, "width": 8, "batch_size": 64},
}
ACTIVATIONS = ("sigmoid", "tanh", "relu")
PLACES = ("before", "after")
COMPARISONS = len(NETWORKS) * len(ACTIVATIONS)
_SCALES: dict[str, dict[str, Any]] = {
    "tiny": {"lrs": (0.3,), "seeds": 2, "steps": {"MLP": 10, "CNN": 6}},
    "quick": {"lrs": (0.1, 0.3, 1.0, 3.0), "seeds": 7, "steps": {"MLP": 250, "CNN": 150}},
    "full": {"lrs": (0.03, 0.1, 0.3, 1.0, 3.0), "seeds": 10, "steps": {"MLP": 5000, "CNN": 3000}},
}


def cells(scale: str) -> list[Cell]:
    s = _SCALES[scale]
    return [{"network": network, "activation": activation, "placement": place, "lr": lr,
             "seed": seed, "steps": s["steps"][network]}
            for seed in range(s["seeds"]) for network in NETWORKS for activation in ACTIVATIONS
            for lr in s["lrs"] for place in PLACES]


def run(cell: Cell) -> Record:
    config = configured(cell, init="kaiming" if cell["activation"] == "relu" else "xavier",
                        **NETWORKS[cell["network"]])
    found = train(config, steps=cell["steps"], every=cell["steps"] // 2)
    return {name: found[name] for name in ("final_accuracy", "diverged")}


def judge(records: Sequence[Record], cells: Sequence[Cell]) -> Finding:
    best = tuned(grouped(records, cells, "network", "activation", "placement", "lr"))
    cases = list(dict.fromkeys((network, activation) for network, activation, _ in best))
    gains = {case: paired(accuracies(best[*case, "after"][1]), accuracies(best[*case, "before"][1]),
                          level=together(COMPARISONS)) for case in cases}
    after = [case for case in cases if gains[case].above(0)]
    before = [case for case in cases if gains[case].below(0)]
    verdict: Any = ("supported" if 2 * len(before) > len(cases) and not after else
                    "depends" if before else "not supported")
    rest = len(cases) - len(before) - len(after)
    sentence = (f"Of {len(cases)} combinations of network and activation, before is better in "
                f"{len(before)}{_listed(before)}, after in {len(after)}{_listed(after)}, and "
                f"{rest} show no difference.")
    rows = [[*case, *(f"{percent(accuracies(best[*case, p][1]))} at {best[*case, p][0]:g}"
                      for p in PLACES), points(gains[case])] for case in cases]
    names = [", ".join(case) for case in cases]
    figure = Figure("Final test accuracy, each at its best learning rate", "", "test accuracy", [
        bars(place, names, [bootstrap(accuracies(best[*case, place][1])) for case in cases])
        for place in PLACES], kind="bar")
    return Finding(verdict, sentence, Table(
        ["network", "activation", "before (at learning rate)", "after", "after − before"], rows),
        [figure], [
            *differs(verdict, "depends", "in Mishkin et al. 2016 before is better in GoogLeNet, "
                                         "and after in CaffeNet"),
            *edges(best, (c["lr"] for c in cells))])


def _listed(cases: Sequence[tuple[str, str]]) -> str:
    return f" ({'; '.join(' '.join(case) for case in cases)})" if cases else ""


STUDY = Study(
    name="placement",
    question="Does batch norm belong before or after the activation?",
    claim="Batch normalization belongs before the activation.",
    source="Ioffe & Szegedy 2015, section 3.2",
    published="Argued, not measured, there. Mishkin et al. 2016 (ImageNet at 128 pixels): CaffeNet "
              "47.4 % before and 49.9 % after; GoogLeNet 60.3 % before and 59.6 % after.",
    setup="An MLP of 4 × 100 units and a CNN of four convolutions on 8 × 8 digits, each with "
          "sigmoid, tanh and ReLU, batch norm before or after every activation; plain SGD at each "
          "arm's best of four learning rates, 7 paired seeds of 250 (MLP) and 150 (CNN) steps.",
    rule="Per network and activation, final test accuracy after minus before: median over paired "
         "seeds with its interval, of 99.2 %. Supported: before is "
         "better (all below 0) in more than half of the cases and after in none. Depends: before "
         "is better in some case otherwise. Not supported: before is better in none.",
    cells=cells, run=run, judge=judge, comparisons=COMPARISONS,
    literature="The sign differs between architectures in the literature, too; residual networks "
               "moved the norm in front of the convolution (He et al. 2016b).",
    changed="After a first run, the grid got the learning rate 3, because arms were best at its "
            "upper end, and the rule was made stricter: before has to win in more than half of the "
            "cases, where one had been enough. " + BY_MEAN + " " + corrected(COMPARISONS, 5, 7),
)
