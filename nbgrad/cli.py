"""The command line. Each command is a few lines here and its work in ``train`` and ``viz``.

Only the standard library is imported before a command runs: ``nbgrad --help`` costs nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from nbgrad.train.config import CHOICES, Config, defaults

__all__ = ["main"]


class _Exit(Exception):
    """Ends a command with a status and a line for the user."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Exit(2, f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for bad input, 128 + signal if interrupted.

    Set NBGRAD_TRACEBACK to see where an error came from.
    """
    try:
        args = _parser().parse_args(argv)
        if getattr(args, "threads", None) is not None:
            from nbgrad.backend import set_num_threads

            with _options():
                set_num_threads(args.threads)
        args.run(args)
        sys.stdout.flush()
    except _Exit as e:
        return _say(str(e), e.status)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:         # `nbgrad info | head -1`: nobody is listening, so say nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, ModuleNotFoundError, MemoryError) as e:
        if os.environ.get("NBGRAD_TRACEBACK"):
            raise
        return _say(" ".join(str(e).split()) or type(e).__name__, 2)
    return 0


def _say(line: str, status: int) -> int:
    print(f"nbgrad: {'error: ' if status == 2 else ''}{line}", file=sys.stderr)
    return status


# --------------------------------------------------------------------------------------- commands

def _compare(args: argparse.Namespace) -> None:
    from nbgrad.train.progress import progress
    from nbgrad.train.report import table
    from nbgrad.train.runs import new_folder
    from nbgrad.train.setup import load_task
    from nbgrad.train.study import Study, compare

    config = _config(args, norm=args.norm)
    seeds = args.seeds or [3]
    if len(seeds) == 1 and seeds[0] < 1:
        raise _Exit(2, f"--seeds: expected how many, at least 1, or which ones, got {seeds[0]}")
    lrs = args.lr or defaults(config.model, config.optimizer)["lrs"]
    with _options():
        study = Study(config, ("none", args.norm), lrs,
                      range(seeds[0]) if len(seeds) == 1 else seeds)
    task = load_task(config)
    folder = new_folder(args.out, "compare")
    _note_missing()
    with progress(len(study.runs()) * config.epochs, quiet=args.quiet) as bar:
        results = compare(study, task, folder, bar)
    print(f"{results['title']}\n{results['details']}\n\n{table(results['summary'])}\n\n"
          f"{results['finding']}\n")
    _write(results, folder)
    if "interrupted" in results:
        _interrupted(results["interrupted"], folder / "last.safetensors")


def _write(results: dict[str, Any], folder: Path) -> None:
    """Results and picture into the folder; says what is in it."""
    from nbgrad.train.runs import write_json

    write_json(folder / "results.json", results)
    if results["runs"] and importlib.util.find_spec("matplotlib"):
        from nbgrad.viz import draw

        draw(results, folder / "curves.png")
    for name in ("results.json", "curves.png", "tensorboard", "best.safetensors"):
        if (folder / name).exists():
            print(folder / name)


def _train(args: argparse.Namespace) -> None:
    from nbgrad.train.loop import Interrupted
    from nbgrad.train.progress import progress
    from nbgrad.train.runs import new_folder, resumed, started
    from nbgrad.train.setup import CLASSES, load_task
    from nbgrad.train.study import diverged

    if args.resume:
        given = sorted(_given(args) - {"epochs", "root"}) + (["out"] if args.out else [])
        if given:
            raise _Exit(2, "--resume goes on with the run's own settings: leave out "
                        + ", ".join("--" + name.replace("_", "-") for name in given))
        with _options():
            one, config = resumed(args.resume, root=args.root, epochs=args.epochs)
    else:
        config = _config(args, lr=args.lr, seed=args.seed, norm=args.norm)
        task = load_task(config)
        folder = new_folder(args.out, "train")
        _note_missing()
        one = started(config, task, folder)
    try:
        with progress(config.epochs, quiet=args.quiet) as bar:
            one.fit(config.epochs, bar)
    except Interrupted as e:
        _interrupted(e.signum, e.path)
    finally:
        for log in (*one.logs, *one.step_logs):
            log.close()
    accuracy = one.history["test/accuracy"]
    ended = f"{100 * accuracy[-1]:.2f} %"
    if one.diverged:
        ended = "diverged: the loss is not finite"
    elif diverged(one, len(CLASSES[config.data])):
        ended = f"diverged: the loss is above that of guessing ({ended})"
    print(f"test accuracy after {one.epoch} epochs: {ended}; best: {100 * max(accuracy):.2f} %")
    print(one.folder)


def _eval(args: argparse.Namespace) -> None:
    from nbgrad.train.evaluation import evaluate
    from nbgrad.train.metrics import batch_norm_layers
    from nbgrad.train.runs import restored
    from nbgrad.train.setup import in_order, load_task

    if args.batch_size is not None and args.batch_size < 1:
        raise _Exit(2, f"--batch-size: expected at least 1, got {args.batch_size}")
    model, config, _ = restored(args.checkpoint)
    task = load_task(config.but(root=args.root or config.root))
    test = in_order(task.test, args.batch_size or config.batch_size)
    if not batch_norm_layers(model):
        print("the network has no batch norm: all statistics give the same")
    for statistics in args.statistics:
        result = evaluate(model, test, statistics=statistics, train=in_order(task.train))
        print(f"{statistics} statistics: accuracy {100 * result.accuracy:.2f} %, "
              f"loss {result.loss:.4f} ({result.samples} test images)")


def _doctor(args: argparse.Namespace) -> None:
    from nbgrad.train.doctor import bn_doctor
    from nbgrad.train.runs import restored
    from nbgrad.train.setup import build_optimizer, in_order, load_task, loader

    if args.batches is not None and args.batches < 1:
        raise _Exit(2, f"--batches: expected at least 1, got {args.batches}")
    model, config, _ = restored(args.checkpoint)
    task = load_task(config.but(root=args.root or config.root))
    print(bn_doctor(model, loader(config, task), test=in_order(task.test, config.batch_size),
                    optimizer=build_optimizer(config, model), batches=args.batches))


def _predict(args: argparse.Namespace) -> None:
    from nbgrad.train.predict import predict
    from nbgrad.train.runs import restored
    from nbgrad.train.setup import CLASSES, SHAPES

    model, config, state = restored(args.checkpoint)
    names = CLASSES[config.data]
    for p in predict(model, args.files, shape=SHAPES[config.data], mean=state["mean"],
                     std=state["std"], invert=args.invert):
        print(f"{p.path}: {names[p.label]} ({100 * p.probabilities[p.label]:.1f} %)")


def _graph(args: argparse.Namespace) -> None:
    from nbgrad import graph
    from nbgrad.train.setup import sample_loss

    with _options():
        model, loss = sample_loss(_config(args, norm=args.norm), args.samples)
    graph.show(loss, dict(model.named_parameters()))


def _info(args: argparse.Namespace) -> None:
    from nbgrad import backend

    facts = backend.info()
    cache = Path(facts["kernel cache"])
    if cache.is_dir():
        size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
        facts["kernel cache"] = f"{cache} ({size / 1e6:.1f} MB)"
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        print(f"{name + ':':18}{text}")


def _bench(args: argparse.Namespace) -> None:
    root = Path(__file__).resolve().parent.parent
    if not (root / "bench" / "__main__.py").exists():
        raise _Exit(2, "bench: needs a checkout, with its folder bench (pip install -e .)")
    sys.path.insert(0, str(root))
    status = importlib.import_module("bench.__main__").main(args.rest)
    if status:
        raise _Exit(status, "interrupted")


def _lab_list(args: argparse.Namespace) -> None:
    from nbgrad.lab.commands import listed

    print(listed())


def _lab_run(args: argparse.Namespace) -> None:
    from nbgrad.lab.commands import run_studies, said
    from nbgrad.lab.running import Plan

    if args.all == bool(args.names):
        raise _Exit(2, "name one or more studies (see nbgrad lab list), or give --all")
    with _options():
        plan = Plan("full" if args.full else "quick", args.data, args.root, args.seeds, args.jobs,
                    Path(args.out), args.again)
    outcomes = run_studies(args.names, plan, args.quiet)
    for text in said(outcomes, plan):
        print(text)
    states = {o.state for o in outcomes}
    if "interrupted" in states:
        raise _Exit(130, "interrupted; the same command goes on where it stopped")
    if "failed" in states:
        failed = ", ".join(o.name for o in outcomes if o.state == "failed")
        raise _Exit(1, f"failed: {failed}; {plan.folder}/<study>/finding.json says where")


def _lab_report(args: argparse.Namespace) -> None:
    from nbgrad.viz.report import write

    folder = args.folder
    if folder is None:                  # `lab run --out DIR && lab report --out DIR`
        there = args.out is not None and any(
            any(Path(args.out).glob(f"*/{name}")) for name in ("finding.json", "cells.jsonl"))
        folder = args.out if there else "runs/lab"
        if args.out is not None and not Path(folder).is_dir():
            raise _Exit(2, f"neither {args.out} nor {folder} holds results of `nbgrad lab run`")
    paths = write(folder, args.out)
    for path in paths[:3]:
        print(path)
    if len(paths) > 3:
        print(f"{paths[3].parent} ({len(paths) - 3} tables)")


def _note_missing() -> None:
    lacking = [name for name in ("rich", "matplotlib", "tensorboardX")
               if importlib.util.find_spec(name) is None]
    if lacking:
        print(f"nbgrad: not installed: {', '.join(lacking)} (progress bar, curves, TensorBoard "
              "logs); pip install 'nbgrad[lab]'", file=sys.stderr)


def _interrupted(signum: int, checkpoint: Path | None) -> NoReturn:
    line = "interrupted"
    if checkpoint is not None and checkpoint.exists():
        line += f"; go on with: nbgrad train --resume {checkpoint}"
    raise _Exit(128 + signum, line)


# ---------------------------------------------------------------------------------------- options

def _given(args: argparse.Namespace) -> set[str]:
    """The fields of Config that were named on the command line."""
    fields = {f.name for f in dataclasses.fields(Config)}
    return {name for name in fields if getattr(args, name, None) is not None}


def _config(args: argparse.Namespace, **settings: Any) -> Config:
    """What was given, else what suits the model, else Config's defaults."""
    model, optimizer = args.model or "mlp", getattr(args, "optimizer", None) or "sgd"
    fields = {f.name for f in dataclasses.fields(Config)}
    suited = {k: v for k, v in defaults(model, optimizer).items() if k in fields}
    own = {k: getattr(args, k) for k in _given(args) - {"lr", "seed", "norm"}}
    with _options():
        return Config(**{**suited, **own, **{k: v for k, v in settings.items() if v is not None}})


@contextmanager
def _options() -> Iterator[None]:
    """An error that begins with a setting's name begins with that of its option."""
    try:
        yield
    except ValueError as e:
        name, _, rest = str(e).partition(": ")
        name = {"lrs": "lr", "set_num_threads": "threads", "processes": "jobs"}.get(name, name)
        fields = {f.name for f in dataclasses.fields(Config)}
        if name not in fields | {"samples", "seeds", "threads", "jobs"}:
            raise
        raise _Exit(2, f"--{name.replace('_', '-')}: {rest}") from e


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="nbgrad",
                     description="Train networks with and without batch normalization.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    p = _command(commands, "compare", _compare, "train a network with and without a norm")
    _run_options(p)
    p.add_argument("--norm", choices=CHOICES["norm"][1:], default="batch",
                   help="what to compare with no norm (batch)")
    p.add_argument("--lr", type=float, nargs="+", help="learning rates (three that suit the model)")
    p.add_argument("--seeds", type=int, nargs="+", help="how many, or which ones if several (3)")
    p = _command(commands, "train", _train, "train one configuration, or go on with it")
    _run_options(p)
    p.add_argument("--norm", choices=CHOICES["norm"], help="(batch)")
    p.add_argument("--lr", type=float, help="learning rate (one that suits the model)")
    p.add_argument("--seed", type=int, help="(0)")
    p.add_argument("--resume", metavar="FOLDER", help="go on from this folder's last checkpoint, "
                   "or from a checkpoint file")
    p = _command(commands, "eval", _eval, "evaluate a checkpoint on the test images")
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a file, or a run's folder (its best)")
    p.add_argument("--statistics", nargs="+", default=["running"], metavar="WHICH",
                   choices=("running", "batch", "population"),
                   help="of batch norm: running (default), batch, population; or several of them")
    p.add_argument("--root", help="folder of the data set, if not where it was")
    p.add_argument("--batch-size", type=int, help="images at a time (the run's)")
    p = _command(commands, "doctor", _doctor,
                 "look for what is wrong with a checkpoint's batch norms")
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a file, or a run's folder (its best)")
    p.add_argument("--root", help="folder of the data set, if not where it was")
    p.add_argument("--batches", type=int, metavar="N",
                   help="look at so many batches of training and test data (all)")
    p = _command(commands, "predict", _predict, "classify image files (.png, .npy)")
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a file, or a run's folder (its best)")
    p.add_argument("files", metavar="FILE", nargs="+")
    p.add_argument("--invert", action="store_true",
                   help="dark ink on light paper (digits and MNIST are light on dark)")
    p = _command(commands, "graph", _graph, "print what is recorded for one loss")
    _model_options(p)
    p.add_argument("--data", choices=CHOICES["data"], help="whose image size (digits)")
    p.add_argument("--norm", choices=CHOICES["norm"], help="(batch)")
    p.add_argument("--samples", type=int, default=4, help="images in the batch (4)")
    _lab_commands(commands)
    # "\0" begins no option here: all of them are for python -m bench, which has the one list
    p = commands.add_parser("bench", prefix_chars="\0", add_help=False,
                            help="measure speed beside PyTorch and NumPy (in a checkout)")
    p.add_argument("rest", nargs="*")
    p.set_defaults(run=_bench)
    _command(commands, "info", _info, "print versions, CPU, threads, cache, devices")
    return parser


def _lab_commands(commands: Any) -> None:
    about = "Settle questions about normalization by measuring."
    lab = commands.add_parser("lab", help=about[0].lower() + about[1:-1], description=about)
    commands = lab.add_subparsers(metavar="COMMAND", required=True)
    _command(commands, "list", _lab_list, "show the studies")
    p = _command(commands, "run", _lab_run, "run studies; finished parts are kept, not run again")
    p.add_argument("names", metavar="STUDY", nargs="*",
                   help="names or numbers of `nbgrad lab list`")
    p.add_argument("--all", action="store_true", help="all studies")
    p.add_argument("--full", action="store_true", help="the papers' steps, more seeds: hours")
    p.add_argument("--data", choices=CHOICES["data"], help="what to train on (digits); studies "
                   "that train on no images say so, and run as ever")
    p.add_argument("--root", help="folder of the data set's files; digits needs none")
    p.add_argument("--seeds", type=int, help="repetitions (each study's own: 5 or more)")
    p.add_argument("--jobs", type=int, help="processes at a time (one per core)")
    p.add_argument("--again", action="store_true", help="run finished parts, too")
    p.add_argument("--out", metavar="FOLDER", default="runs/lab",
                   help="for the results (runs/lab)")
    p.add_argument("--quiet", action="store_true", help="no progress")
    p = _command(commands, "report", _lab_report, "write one page of all results, without network")
    p.add_argument("folder", metavar="FOLDER", nargs="?", help="with the results of lab run (that "
                   "of --out if it has some, else runs/lab)")
    p.add_argument("--out", metavar="FILE|FOLDER", help="an .html file for the page alone, or "
                   "where page, Markdown and CSV go (beside the results)")


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    about = text[0].upper() + text[1:] + "."
    p: argparse.ArgumentParser = commands.add_parser(name, help=text, description=about)
    p.add_argument("--threads", type=int, help="threads of parallel kernels (all cores)")
    p.set_defaults(run=run)
    return p


def _model_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", choices=CHOICES["model"], help="(mlp)")
    p.add_argument("--placement", choices=CHOICES["placement"],
                   help="of the norm, to the activation (before)")
    p.add_argument("--activation", choices=CHOICES["activation"],
                   help="(mlp: sigmoid; others: relu)")
    p.add_argument("--dropout", type=float, help="probability (0)")


def _run_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", choices=CHOICES["data"], help="(digits)")
    p.add_argument("--root", help="folder of the data set's files; digits needs none")
    _model_options(p)
    p.add_argument("--init", choices=CHOICES["init"], help="weights (mlp: normal; others: kaiming)")
    p.add_argument("--optimizer", choices=CHOICES["optimizer"], help="(sgd)")
    p.add_argument("--momentum", type=float, help="of sgd (mlp: 0; others: 0.9)")
    p.add_argument("--weight-decay", type=float, help="(0; resnet20: 1e-4)")
    p.add_argument("--schedule", choices=CHOICES["schedule"],
                   help="of the learning rate (mlp: constant; others: cosine)")
    p.add_argument("--warmup", type=int, metavar="EPOCHS", help="linear warm-up (0)")
    p.add_argument("--clip-grad", type=float, metavar="NORM", help="largest gradient norm (none)")
    p.add_argument("--batch-size", type=int, help="(mlp: 60; lenet: 64; resnet20: 128)")
    p.add_argument("--epochs", type=int, help="(mlp: 30; lenet: 8; resnet20: 10)")
    p.add_argument("--out", metavar="FOLDER", help="for the results (runs/<command>-<date>-<time>)")
    p.add_argument("--quiet", action="store_true", help="no progress")


class _Version(argparse.Action):
    """argparse's own wants the number when the parser is made; looking it up costs 20 ms."""

    def __call__(self, parser: Any, *args: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"nbgrad {version('nbgrad')}")
        raise SystemExit(0)
