"""Statistics of a data set for the batch norms of a model: exact, or in one pass; new data mixed
with what was known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np

from nbgrad.autograd import Tensor, bump, no_grad
from nbgrad.nn import BatchNorm, Module
from nbgrad.nn.hooks import input_of
from nbgrad.nn.module import check_model
from nbgrad.nn.running import RunningNorm, keeps_statistics
from nbgrad.nn.statistics import fits
from nbgrad.ops import Generator, Moments, moments
from nbgrad.ops.random import default_generator
from nbgrad.train.metrics import batch_norm_layers
from nbgrad.train.progress import Silent, progress as show

__all__ = ["adapt", "first_input", "generators_unchanged", "population_statistics", "unchanged",
           "update_bn", "use_population_statistics", "using"]

Array = np.ndarray[Any, Any]
Found = dict[str, tuple[Array, Array]]
_KEPT = ("frozen", "prediction")        # nothing moves the first, and the second is not looked at


def update_bn(model: Module, loader: Iterable[Any], *, exact: bool = True,
              progress: bool = False) -> Found:
    """Write the statistics of all of ``loader`` into the running ones; returns them by layer.

    loader: batches, of which the first part is the model's input; gone through several times, so
    not an iterator. Mean and biased variance, (count, mean, M2) merged in float64: evaluation then
    computes what one forward pass with the whole set as a single batch would (the limit of Ioffe &
    Szegedy 2015, algorithm 2), whatever the size and order of batches.

    exact: a layer's statistics are taken when those before it normalize by theirs, in one pass per
    layer, which ends there. Otherwise one pass, in which the layers before use the statistics of
    each batch ("PreciseBN", Wu & Johnson 2021): cheaper, and dependent on the batch size.

    Dropout is off. num_batches_tracked becomes the number of batches. Layers with statistics
    "frozen" or "prediction" stay as they are, as do channels of which a mask leaves nothing, and,
    with on_nonfinite "skip_update", those with NaN or infinity. With workers, statistics and counts
    are those of all. On Ctrl-C or an error the model is as it was.

    Raises ValueError for an empty loader or an iterator, for a layer that runs twice in one forward
    pass or keeps no running statistics, and for norms with others than the batch's mean and
    variance (LpBatchNorm, instance norm that tracks, …); FloatingPointError where on_nonfinite is
    "raise".

    >>> from nbgrad import nn
    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> update_bn(model, [Tensor([[1.0], [3.0]]), Tensor([[8.0]])])["0"]
    (array([4.]), array([8.66666667]))
    >>> model[0].running_mean.tolist(), model[0].num_batches_tracked.item()
    ([4.0], 2)
    """
    check_model("update_bn", model)
    return _replace(model, loader, _moving(model), exact, 0.0, progress)


def adapt(model: Module, loader: Iterable[Any], *, prior: float = 0.0, exact: bool = True,
          progress: bool = False) -> Found:
    """Statistics of new data in place of, or mixed with, the running ones; returns them by layer.

    mean ← (N mean + n mean') / (N + n), var likewise, where n samples with mean' and var' are in
    ``loader`` and N = ``prior`` says how many samples the old ones are worth (Schneider et al.
    2020, who recommend 8 to 512); 0 forgets them. A layer sees what those before it make with
    their mixed statistics (``exact``). Otherwise, and in what it raises, as ``update_bn``;
    ValueError also for a negative or infinite prior.

    >>> from nbgrad import nn
    >>> model = nn.Sequential(nn.BatchNorm1d(1))                 # mean 0, var 1
    >>> adapt(model, [Tensor([[1.0], [3.0]])], prior=6)["0"]
    (array([0.5]), array([1.]))
    """
    if not 0 <= prior < np.inf:
        raise ValueError(f"adapt: prior must be a number of samples of at least 0, got {prior}")
    check_model("adapt", model)
    return _replace(model, loader, _moving(model), exact, float(prior), progress)


def population_statistics(model: Module, train: Iterable[Any]) -> Found:
    """What ``update_bn`` would write into each layer (frozen ones, too), and the model stays as it
    was. Raises what ``update_bn`` raises."""
    _refuse_others(model)
    with unchanged(model):
        return use_population_statistics(model, train)


def use_population_statistics(model: Module, train: Iterable[Any]) -> Found:
    """``update_bn`` for all layers, frozen ones, too."""
    return _replace(model, train, batch_norm_layers(model), True, 0.0, False)


# -------------------------------------------------------------------------- what is left as it was

@contextmanager
def unchanged(model: Module, *, errors_only: bool = False) -> Iterator[None]:
    """Put modes, buffers and the modules' own random generators back as they were, also after an
    error; with ``errors_only``, after success the modes alone."""
    modes = [(m, m.training) for m in model.modules()]
    saved = [(b, b.data.copy()) for b in model.buffers()]
    averages: list[tuple[Any, Any, Any]] = [
        (m, m._pending, m._skipped) for m in model.modules()
        if isinstance(m, BatchNorm | RunningNorm)]
    current = {layer for layer, batches, _ in averages
               if batches is not None and batches[0] == layer._moment()}
    drawn = [(g, g.get_state()) for m in model.modules() for g in vars(m).values()
             if isinstance(g, Generator)]
    done = False
    try:
        yield
        done = True
    finally:
        for module, training in modes:
            module.training = training
        if not (done and errors_only):
            for buffer, values in saved:
                buffer.data[...] = values
                bump(buffer)
            for layer, batches, skipped in averages:
                # those that still counted go on counting
                layer._pending = (layer._moment(), *batches[1:]) if layer in current else batches
                layer._skipped = skipped
            for generator, state in drawn:
                generator.set_state(state)


@contextmanager
def generators_unchanged(*loaders: Any) -> Iterator[None]:
    """Put the default generator's state, and those of loaders, back: a run goes on as if nobody had
    looked."""
    found = [default_generator, *(g for g in (getattr(one, "generator", None) for one in loaders)
                                  if g is not None)]
    before = [g.get_state() for g in found]
    try:
        yield
    finally:
        for generator, state in zip(found, before):
            generator.set_state(state)


@contextmanager
def using(words: Mapping[Any, str]) -> Iterator[None]:
    """Layers with other ``statistics`` for a while."""
    before = [(layer, layer.statistics) for layer in words]
    try:
        for layer, word in words.items():
            layer.statistics = word
        yield
    finally:
        for layer, word in before:
            layer.statistics = word


# ------------------------------------------------------------------------------------- the passes

def _refuse_others(model: Module) -> None:
    """Statistics that are no mean and variance of the input are not found, and not passed over."""
    names = [name or "model" for name, m in model.named_modules()
             if keeps_statistics(m)]
    if names:
        raise ValueError("population statistics: expected batch norms, whose statistics are a mean "
                         f"and a variance; those of {', '.join(names)} cannot be found")


def _moving(model: Module) -> dict[str, Any]:
    _refuse_others(model)
    return {name: layer for name, layer in batch_norm_layers(model).items()
            if layer.statistics not in _KEPT}


def _replace(model: Module, loader: Iterable[Any], layers: dict[str, Any], exact: bool,
             prior: float, bar: bool) -> Found:
    found: Found = {}
    if not layers:
        return found
    words = dict.fromkeys(layers.values(), "running" if exact else "prediction")
    with unchanged(model, errors_only=True), using(words), no_grad():
        model.eval()
        order = _in_order_of_use(model, loader, layers)
        stages = [{name: layer} for name, layer in order.items()] if exact else [order]
        with show(len(stages) * _length(loader), quiet=not bar) as shown:
            for i, stage in enumerate(stages):
                seen = _pass(model, stage, loader, exact, _Steps(shown, i, len(stages), loader))
                for name, layer in stage.items():
                    found[name] = _write(layer, name, *seen[name], prior)
    return found


class _Steps:
    """Tells a bar of the batches of the i-th of some passes."""

    def __init__(self, bar: Silent, i: int, passes: int, loader: Iterable[Any]) -> None:
        self.bar, self.start = bar, i * _length(loader)
        self.text = f"statistics, pass {i + 1} of {passes}"
        bar.say(self.text)

    def __call__(self, done: int) -> None:
        self.bar.update(self.start + done, self.text)


def _length(loader: Any) -> int:
    return len(loader) if hasattr(loader, "__len__") else 1


class _Reached(Exception):
    """Ends a forward pass at the layer whose input was wanted."""


class _Seen:
    """A layer's inputs so far: their merged moments, and how many samples and batches."""

    def __init__(self, ends: bool) -> None:
        self.ends, self.samples, self.batches = ends, 0, 0
        self.moments: Moments | None = None

    def __call__(self, _: Module, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        x = input_of(args, settings)
        batch = moments(x, mask=settings.get("mask"))
        self.moments = batch if self.moments is None else self.moments.merge(batch)
        self.samples, self.batches = self.samples + x.shape[0], self.batches + 1
        if self.ends:
            raise _Reached


def _pass(model: Module, layers: Mapping[str, Any], loader: Iterable[Any], ends: bool,
          step: Callable[[int], None]) -> dict[str, tuple[Moments, int, int]]:
    """Per layer: the moments of its inputs, samples, batches."""
    seen = {name: _Seen(ends) for name in layers}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(seen[name], with_kwargs=True))
        for i, batch in enumerate(loader, 1):
            with suppress(_Reached):
                model(first_input(batch))
            step(i)
    found = {}
    for name, s in seen.items():
        if s.moments is None:
            raise ValueError(f"population statistics: batch norm {name!r} was reached by no batch")
        found[name] = _of_all(layers[name].workers, s.moments, s.samples, s.batches)
    return found


def _of_all(workers: Any, own: Moments, samples: int, batches: int) -> tuple[Moments, int, int]:
    """Those of all workers: each mixes and counts alike."""
    if workers is None:
        return own, samples, batches
    merged = workers.merge(own)
    total, = workers.sum(np.array([samples, batches], np.int64))
    return merged, int(total[0]), int(total[1])


def _write(layer: Any, name: str, found: Moments, samples: int, batches: int,
           prior: float) -> tuple[Array, Array]:
    """Into the running statistics, mixed with what they were; channels of which nothing was counted
    keep theirs."""
    mean, var = found.mean, found.var()
    skip = found.count == 0
    dtype = layer.running_mean.dtype
    bad = ~(skip | fits(mean, dtype) & fits(var, dtype))
    if layer.on_nonfinite == "raise" and bad.any():
        where = ", ".join(map(str, np.flatnonzero(bad)[:8]))
        raise FloatingPointError(f"population statistics: the mean or variance in batch norm "
                                 f"{name!r} is not finite in channels {where}")
    if layer.on_nonfinite == "skip_update":
        skip = skip | bad
    mixed = []
    for buffer, new in ((layer.running_mean, mean), (layer.running_var, var)):
        old = buffer.data.astype(np.float64)
        with np.errstate(all="ignore"):
            value = (prior * old + samples * new) / (prior + samples) if prior else new
        mixed.append(np.where(skip, old, value))
        buffer.data[...] = mixed[-1]
        bump(buffer)
    if not skip.all():
        layer.num_batches_tracked.data[...] = batches
    layer._pending = None                   # batches before are no longer part of the statistics
    return mixed[0], mixed[1]


def _in_order_of_use(model: Module, loader: Iterable[Any],
                     layers: dict[str, Any]) -> dict[str, Any]:
    """The layers in the order in which batches pass through them: one batch, or as many as it takes
    until all have been reached."""
    order: list[str] = []
    seen: list[str] = []
    parts = {aux for m in model.modules() for aux in getattr(m, "aux_bn", ())}     # of a split
    wanted = {name for name, layer in layers.items() if layer not in parts}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(
                lambda *_, name=name: seen.append(name)))
        for name, layer in layers.items():
            if layer.running_mean is None:
                raise ValueError(f"population statistics: batch norm {name!r} keeps no running "
                                 "statistics (track_running_stats=False)")
        # a worker whose part is empty takes part in what the others find
        shared = any(layer.workers is not None for layer in layers.values())
        for x in _inputs(loader, shared):
            seen.clear()
            model(x)
            _insert(order, seen)
            if shared or wanted <= set(order):       # workers make as many passes as each other
                break
    return {name: layers[name] for name in order}


def _insert(order: list[str], seen: list[str]) -> None:
    """What one forward pass has seen, each behind what came before it."""
    twice = next((name for name in seen if seen.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"population statistics: batch norm {twice!r} runs twice in one forward "
                         "pass, on two different populations")
    at = 0
    for name in seen:
        if name not in order:
            order.insert(at, name)
        at = order.index(name) + 1


def first_input(batch: Any) -> Tensor:
    """The model's input of a batch: itself, or the first of a tuple or list."""
    first = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
    if not isinstance(first, Tensor):
        raise TypeError("expected batches that are a Tensor, or a tuple or list whose first is the "
                        f"model's input, got {type(batch).__name__}"
                        + ("" if first is batch else f" of {type(first).__name__}"))
    return first


def _inputs(loader: Iterable[Any], empty: bool) -> Iterator[Tensor]:
    """The model's inputs that hold samples; with ``empty``, one that does not if none does."""
    if isinstance(loader, Iterator):
        raise ValueError("population statistics: an iterator ends after one pass, and one per "
                         "layer is needed: pass a list or a DataLoader")
    x, found = None, False
    for batch in loader:
        x = first_input(batch)
        if len(x.data):
            found = True
            yield x
    if not found and (x is None or not empty):
        raise ValueError("population statistics: the training set is empty")
    if not found and x is not None:
        yield x
