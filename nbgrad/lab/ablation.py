"""An experiment as one expression: a grid of settings × seeds, paired, and what it shows."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbgrad.lab.arms import accuracies, bars, edges, lost, percent, points, steps_to, tuned
from nbgrad.lab.intervals import Interval, bootstrap, paired, together
from nbgrad.lab.judging import arrival, needed
from nbgrad.lab.results import text_table
from nbgrad.lab.running import Plan, run
from nbgrad.lab.study import Cell, Figure, Finding, Record, Study, Table
from nbgrad.lab.training import task_of, train
from nbgrad.train.config import Config
from nbgrad.train.progress import Silent, progress as bar

__all__ = ["Ablation", "Arm", "ablate"]

EVALUATIONS = ("running", "batch", "population")
_OF_NORMS = ("placement", "groups", "ghost", "decay")     # without a norm, these say nothing
_PLACES = ("each", "before", "last")


@dataclass(frozen=True)
class Arm:
    """One combination of settings (those that vary), at the learning rate that was chosen for it
    where one was, and its records in the order of the seeds. ``also``: other combinations that were
    asked for and are the same runs, such as another placement of no norm."""

    settings: dict[str, Any]
    lr: float
    records: Sequence[Record]
    also: Sequence[dict[str, Any]] = ()

    @property
    def name(self) -> str:
        return _named(self.settings)

    @property
    def asked(self) -> list[dict[str, Any]]:
        return [self.settings, *self.also]


@dataclass(frozen=True)
class Ablation:
    """What an ablation found. ``print`` shows the table and the finding's sentence and notes.

    finding: of the first axis that varies. Supported: some value differs from the axis's first
    one, and where it does, always in the same direction. Depends: in both directions. Not
    supported: no difference is shown. A difference is one in final test accuracy whose bootstrap
    interval over paired seeds leaves 0 out, all intervals together with 95 %, see
    ``intervals.together``; a diverged run counts with the accuracy that it has. Of fewer than five
    seeds (six for three comparisons, seven for five) there is no verdict ("depends"), which the
    sentence says.
    """

    arms: Sequence[Arm]
    finding: Finding

    def difference(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> Interval:
        """Final test accuracy of one arm minus another's, paired; each named by its settings."""
        one, other = self._arm(a), self._arm(b)
        return paired(accuracies(one.records), accuracies(other.records))

    def _arm(self, settings: Mapping[str, Any]) -> Arm:
        found = [arm for arm in self.arms
                 if any(settings.items() <= own.items() for own in arm.asked)]
        if len(found) != 1:
            raise ValueError(f"expected settings of one arm, got those of {len(found)}: "
                             f"{dict(settings)}")
        return found[0]

    def __str__(self) -> str:
        return "\n\n".join([text_table(self.finding.table),
                            f"{self.finding.verdict}: {self.finding.sentence}",
                            *self.finding.notes])


def ablate(base: Config | None = None, *, seeds: int | None = None, steps: int | None = None,
           every: int | None = None, tune: bool = False, level: float = 0.95,
           folder: Path | str = "runs/lab", processes: int | None = None,
           progress: Silent | None = None, **axes: Any) -> Ablation:
    """Train every combination of the axes for several seeds, and compare.

    axes: fields of Config, each a value or a list of them: norm, lr, batch_size, ghost, groups,
    decay, momentum, init, gain, activation, optimizer, depth, width, model, … In addition,
    placement "none" is no norm; dropout takes "none", "before", "each" and "last" beside numbers
    (probability 0.5, if base has none); evaluation: "running", "batch", "population", the
    statistics that batch norms are tested with.
    seeds: repetitions (as a default, as many as a verdict on either sign needs: 5 for one
    comparison, 6 for two, 7 for four); runs of one seed have the same initial weights and batches
    in all arms.
    steps: of each run, evaluated after each ``every`` (the epochs of ``base``, evaluated after
    each; and a fiftieth of the steps).
    tune: choose lr for each arm, from the values given for it, as ``arms.tuned`` does.
    level: the test accuracy whose first step is in the table.
    folder and processes: see ``Plan``: cells run in parallel, are kept, and are not run again.
    progress: where it is shown, see ``nbgrad.train.progress``; as a default, a bar with the time
    left where stderr is a terminal and rich is installed. ``Silent()`` shows nothing.

    Raises ValueError for combinations that Config refuses, for ``seed`` as an axis (runs of one
    seed are pairs, not arms) and for numbers that are none of seeds, steps or an accuracy, before
    anything runs; RuntimeError for a cell that fails, KeyboardInterrupt at Ctrl-C: the same call
    then goes on.

    Example: ``print(ablate(Config(lr=1.0), norm=["none", "batch"], lr=[0.1, 1.0], tune=True))``
    """
    _check(level, seeds=seeds, steps=steps, every=every)
    grid = _Grid(base or Config(), axes, tune)
    comparisons = max(len(list(_against(grid.settings()))), 1)
    seeds = needed(2 * comparisons) if seeds is None else seeds
    cells = [{**cell, "seed": seed, "steps": steps, "every": every, "level": level}
             for seed in range(seeds) for cell in grid.cells()]
    found: list[Ablation] = []

    def judge(records: Sequence[Record], cells: Sequence[Cell]) -> Finding:
        found.append(_judged(grid.arms(records, cells), level, grid.tried))
        return found[-1].finding

    name = "ablation-" + hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:10]
    question = f"Does {next(iter(grid.varied), 'anything')} make a difference?"
    study = Study(name, question, "", "", "", "", "", lambda scale: [
        {**cell, "steps": 2, "every": 1} for cell in cells] if scale == "tiny" else cells,
        run_cell, judge, comparisons=comparisons)
    plan = Plan(processes=processes, folder=Path(folder))
    with bar(1) if progress is None else nullcontext(progress) as shown:
        outcome, = run([study], plan, shown)
    if outcome.state == "interrupted":
        raise KeyboardInterrupt(f"{outcome.done} of {outcome.cells} cells are done; the same call "
                                "goes on")
    if not found or outcome.finding is None:
        raise RuntimeError("a cell failed: " + outcome.errors[0])
    return dataclasses.replace(found[0], finding=outcome.finding)


def _check(level: float, **counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if not 0 < level <= 1:
        raise ValueError(f"level: expected a test accuracy, such as 0.95, got {level:g}")


def run_cell(cell: Cell) -> Record:
    """Train one combination, and evaluate it as asked."""
    config = Config(**cell["config"]).but(seed=cell["seed"])
    steps, every = cell["steps"], cell["every"]
    if steps is None:
        every = max(len(task_of(config).train) // config.batch_size, 1)
        steps = config.epochs * every
    found = train(config, steps=steps, every=every or max(steps // 50, 1),
                  evaluations=cell["evaluations"])
    return {**found, "steps_to": steps_to(found, cell["level"])}


class _Grid:
    """The combinations of axes. ``varied``: those with more than one value, lr apart if tuned."""

    def __init__(self, base: Config, axes: dict[str, Any], tune: bool) -> None:
        self.base, self.tune = base, tune
        self.axes = {name: list(v) if isinstance(v, list | tuple | range) else [v]
                     for name, v in axes.items()}
        for name, values in self.axes.items():
            if not values or len({json.dumps(v) for v in values}) != len(values):
                raise ValueError(f"{name}: expected one or more different values, got {values}")
        if "seed" in self.axes:
            raise ValueError("seed: no axis, every arm has the same ones; seeds is how many")
        if tune and len(self.axes.get("lr", ())) < 2:
            raise ValueError("tune: expected lr with the values to choose from")
        self.evaluations = self.axes.pop("evaluation", ["running"])
        unknown = set(self.evaluations) - set(EVALUATIONS)
        if unknown:
            raise ValueError(f"evaluation: expected {', '.join(EVALUATIONS)}, got "
                             f"{', '.join(map(str, sorted(unknown)))}")
        self.varied = [n for n, v in self.axes.items() if len(v) > 1 and not (tune and n == "lr")]
        self.tried = self.axes["lr"] if tune else []
        self._points = self._distinct()

    def _distinct(self) -> list[tuple[list[dict[str, Any]], Config]]:
        """Each Config, with all combinations that come to it, in the order of the first ones."""
        found: dict[str, tuple[list[dict[str, Any]], Config]] = {}
        for values in itertools.product(*self.axes.values()):
            settings = dict(zip(self.axes, values))
            config = _config(self.base, settings)
            found.setdefault(config.to_json(), ([], config))[0].append(settings)
        return list(found.values())

    def cells(self) -> list[Cell]:
        return [{"config": config.to_dict(), "evaluations": self.evaluations}
                for _, config in self._points]

    def arms(self, records: Sequence[Record], cells: Sequence[Cell]) -> list[Arm]:
        """By settings that vary; where lr is tuned, the best one of each."""
        runs: dict[str, list[Record]] = {}
        for record, cell in zip(records, cells):
            runs.setdefault(json.dumps(cell["config"]), []).append(record)
        groups: dict[Any, list[Record]] = {}
        asked: dict[str, list[dict[str, Any]]] = {}
        for word, config, names in self._asked():
            key = json.dumps(names[0])
            asked.setdefault(key, names)
            groups[key, config.lr] = [{**r, "final_accuracy": r["accuracies"][word]}
                                      for r in runs[json.dumps(config.to_dict())]]
        return [Arm(asked[key][0], lr, own, asked[key][1:])
                for key, (lr, own) in tuned(groups).items()]

    def settings(self) -> list[Arm]:
        """The arms, before there are records."""
        found = {json.dumps(own): Arm(own, config.lr, (), also)
                 for _, config, (own, *also) in self._asked()}
        return list(found.values())

    def _asked(self) -> Iterator[tuple[str, Config, list[dict[str, Any]]]]:
        """Each run and word of evaluation, with the combinations of settings that come to it."""
        for same, config in self._points:
            for word in self.evaluations:
                yield word, config, [
                    {name: settings[name] for name in self.varied}
                    | ({"evaluation": word} if len(self.evaluations) > 1 else {})
                    for settings in same]


def _config(base: Config, settings: dict[str, Any]) -> Config:
    """Words of an ablation as fields of Config."""
    fields = dict(settings)
    if fields.get("placement") == "none":
        fields |= {"norm": "none", "placement": "before"}
    if isinstance(fields.get("dropout"), str):
        word = fields.pop("dropout")
        if word != "none" and word not in _PLACES:
            raise ValueError("dropout: expected a probability, or none, before, each or last, got "
                             f"{word!r}")
        fields |= {"dropout": 0.0} if word == "none" else {
            "dropout": base.dropout or 0.5, "dropout_at": word}
    if fields.get("norm", base.norm) == "none":
        fields |= dict.fromkeys(_OF_NORMS[1:]) | {"placement": "before"}
    try:
        return base.but(**fields)
    except TypeError as e:
        raise ValueError(f"ablate: {e}".replace("Config.__init__() got an ", "")) from e


def _named(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}"
                     for k, v in settings.items()) or "the base"


def _judged(arms: Sequence[Arm], level: float = 0.95, tried: Sequence[float] = ()) -> Ablation:
    """The finding on the first axis: each value against its first, everything else equal; and
    which arms are best at an end of the learning rates that were tried."""
    pairs = list(_against(arms))
    found = [(name, paired(accuracies(arm.records), accuracies(base.records),
                           level=together(len(pairs)))) for name, arm, base in pairs]
    up, down = any(d.above(0) for _, d in found), any(d.below(0) for _, d in found)
    verdict: Any = "depends" if up and down else "supported" if up or down else "not supported"
    sentence = f"{arms[0].name} ends with {percent(accuracies(arms[0].records))}."
    if found:
        axis, first = next(iter(arms[0].settings.items()))
        sentence = f"Against {axis} {first}: " + "; ".join(
            f"{name} {points(d)}" for name, d in found) + "."
    names = [arm.name for arm in arms]
    figure = Figure("Final test accuracy (median over seeds)", "", "test accuracy", [
        bars("median", names, [bootstrap(accuracies(arm.records)) for arm in arms])], kind="bar")
    notes = edges({arm.name: (arm.lr, []) for arm in arms}, tried)
    return Ablation(arms, Finding(verdict, sentence, _table(arms, level), [figure], notes))


def _against(arms: Sequence[Arm]) -> Iterator[tuple[str, Arm, Arm]]:
    """Each combination that was asked for, and the same one with the first axis's first value; what
    is the same pair of runs, once."""
    axis = next(iter(arms[0].settings), None)
    if axis is None:
        return
    first = arms[0].settings[axis]
    of = {json.dumps(own, sort_keys=True): arm for arm in arms for own in arm.asked}
    seen: set[tuple[int, int]] = set()
    for arm in arms:
        for own in arm.asked:
            base = of.get(json.dumps({**own, axis: first}, sort_keys=True), arm)
            pair = id(arm), id(base)
            if base is not arm and pair not in seen:
                seen.add(pair)
                yield _named(own), arm, base


def _table(arms: Sequence[Arm], level: float) -> Table:
    axes = list(arms[0].settings)
    columns = [*axes, *([] if "lr" in axes else ["lr"]), "final accuracy",
               f"steps to {100 * level:g} %", "diverged"]
    return Table(columns, [
        [*(f"{v:g}" if isinstance(v, float) else str(v) for v in arm.settings.values()),
         *([] if "lr" in axes else [f"{arm.lr:g}"]), percent(accuracies(arm.records)),
         arrival(arm.records, level), lost(arm.records)]
        for arm in arms])
