"""Arguments drawn for the norm functions and layers, which ``bench.fuzz`` calls with them."""

import inspect
import math
from functools import cache

import numpy as np

import nbgrad
from nbgrad import nn, ops
from nbgrad.backend import half_dtype, is_half
from nbgrad.nn import functional as F
from nbgrad.nn.lazy import Lazy
from nbgrad.nn.statistics import step_taken
from nbgrad.nn.utils import parametrizations, parametrize

__all__ = ["DOCUMENTED", "FUNCTIONS", "Draw"]

DOCUMENTED = ValueError, TypeError, RuntimeError, IndexError, FloatingPointError
SANE = 0.65                          # of the draws: all arguments fit each other
LONG = 70                            # a length at which kernels take whole vectors, and a rest
HALVES = tuple(half_dtype(name) for name in ("float16", "bfloat16"))
DTYPES = tuple(map(np.dtype, (np.float32,) * 6 + (np.float64,) * 2)) + HALVES
OTHERS = tuple(map(np.dtype, (np.int64, np.bool_)))
POWERS = 1, 2, 3, 4, 1.5, 2.5, 7, 32, 33, math.inf
NUMBERS = (1e-5, 0.1, 0.0, -1.0, 1.0, float("nan"), float("inf"), 1, 2, -3, 10**9, None, "1", [])
NAMES = (None, "batch", "layer", "group", "instance", "rms", "local", "evonorm_s0", "ghost",
         "split", "renorm", "frozen", "sync", "lp", "mean_only", "noisy", "decorrelated",
         "switchable", "filter_response", "global_response", "evonorm_b0")


class Draw:
    """Arguments of one call: in ``SANE`` of the draws all fit each other, in the others now and
    then one does not. ``leaves``: the tensors that were drawn."""

    def __init__(self, rng):
        self.rng, self.sane, self.leaves = rng, rng.random() < SANE, []
        self.shape = self._shape()
        self.dtype = self.own = self.choice(OTHERS if self.odd(0.3) else DTYPES)
        if is_half(self.dtype) and self.some(0.7):           # what parameters then usually are
            self.own = np.dtype(np.float32)

    def _shape(self):
        if self.odd(0.3):
            return tuple(self.rng.integers(0, 5, self.rng.integers(0, 6)).tolist())
        shape = self.rng.integers(1, 6, self.rng.integers(2, 5)).tolist()
        if self.odd(0.15) or self.some(0.15):                # nothing, one of something, or many
            shape[self.rng.integers(len(shape))] = int(self.rng.integers(
                *((6, LONG) if self.some(0.5) else (1 if self.sane else 0, 2))))
        return tuple(shape)

    def fit(self, dims):
        """A number of dimensions that is meant, if everything is to fit."""
        if self.sane and len(self.shape) not in dims:
            self.shape = (*self.shape, 3, 2, 3)[:self.choice(dims)]
        return self

    def some(self, chance):
        """Whether to do one of the things that may be done."""
        return self.rng.random() < chance

    def odd(self, chance=0.06):
        """Whether to do what does not fit."""
        return not self.sane and self.some(chance)

    def choice(self, of):
        return of[self.rng.integers(len(of))]

    def flag(self):
        return bool(self.rng.integers(2))

    def number(self, usual):
        return self.choice(NUMBERS) if self.odd(0.15) else usual

    def size(self, usual):
        """A number of things that are made: 10⁹ of them are right, and take all memory or time."""
        n = self.number(usual)
        return -3 if n == 10**9 else n

    def divisor(self, n):
        return self.choice([k for k in range(1, n + 1) if n % k == 0] or [1])

    def groups(self):
        return self.number(self.divisor(self.shape[1] if len(self.shape) > 1 else 1))

    # ----------------------------------------------------------------------------------- tensors

    def tensor(self, shape, dtype=None, least=None):
        if self.odd():
            return (None, 3.0, "x", np.ones(3, np.float32), [1.0])[self.rng.integers(5)]
        if self.odd():
            shape = self.choice(((*shape, 2), shape[1:], tuple(n + 1 for n in shape),
                                 tuple(1 for _ in shape)))
        dtype = self.dtype if dtype is None else dtype
        if self.odd():
            dtype = self.choice(DTYPES + OTHERS)
        with np.errstate(all="ignore"):
            x = (self.rng.standard_normal(shape) * 10.0 ** self.rng.integers(-3, 4)).astype(dtype)
        if least is None:
            x = self.memory(x)
        else:
            x = np.maximum(x.astype(np.float64), least).astype(dtype)
        if x.size and x.flags.writeable and x.dtype.kind in "fV" and self.some(0.03):
            with np.errstate(all="ignore"):
                x.reshape(-1)[0] = self.choice((np.nan, np.inf, -np.inf, 1e38))
        t = nbgrad.Tensor(x)
        t.requires_grad = bool(x.dtype.kind in "fV" and least is None and self.flag())
        self.leaves.append(t)
        return t

    def memory(self, x):
        """The values in other memory, now and then: reversed, strided, transposed, expanded."""
        if not x.ndim or not self.some(0.2):
            return x
        return (x[::-1], np.asfortranarray(x), np.repeat(x, 2, -1)[..., ::2],
                np.broadcast_to(x[:1], x.shape),
                np.moveaxis(np.ascontiguousarray(np.moveaxis(x, min(1, x.ndim - 1), -1)), -1,
                            min(1, x.ndim - 1)))[self.rng.integers(5)]

    def x(self):
        return self.tensor(self.shape)

    def scale(self, shape, needed=False):
        """A parameter, or none."""
        return None if not needed and self.some(0.3) else self.tensor(shape, self.own)

    def channels(self, needed=False):
        return self.scale(self.shape[1:2], needed)

    def kept(self, needed=True):
        """A parameter or statistic of each channel, (1, C, 1, …)."""
        return self.scale((1, *self.shape[1:2], *[1] * (len(self.shape) - 2)), needed)

    def running(self, needed=False):
        """Running statistics, or none."""
        if self.odd(0.2):
            return self.channels(), self.channels()
        if not needed and self.some(0.3):
            return None, None
        return [self.tensor(self.shape[1:2], self.own, least) for least in (-math.inf, 0.0)]

    def mask(self):
        """Booleans or weights of positions, in a shape that broadcasts, or an odd one; or None."""
        if self.some(0.5):
            return None
        N, *S = self.shape[:1] + self.shape[2:] or (1,)
        shapes = (N, *S), (N,) + (1,) * len(S), (N, 1, *S), (*S,)
        shape = self.choice(shapes[:3 if self.sane else 4])
        mask = self.rng.integers(0, 3, shape) * self.choice((0.5, 1, True))
        return self.choice((mask, mask > 0, mask.astype(np.float32) - self.odd(0.1),
                            nbgrad.tensor(mask.astype(np.float32)), self.number(mask)))


# -------------------------------------------------------------------------------------- functions

def batch_norm(d):
    x, training = d.x(), d.flag()
    more = {}
    if training and d.some(0.2):
        more["moments"] = (ops.moments(d.tensor((2, 3))) if d.odd(0.3) else
                           3.0 if d.odd() else ops.moments(x))
    if (training or d.odd(0.3)) and d.some(0.2):
        more["return_moments"] = True
    return F.batch_norm(x, *d.running(needed=not training), d.channels(), d.channels(), training,
                        d.number(0.1), d.number(1e-5), residual=d.x() if d.some(0.2) else None,
                        activation="relu" if d.some(0.3) else d.number(None), **more)


def weighted_batch_norm(d):
    workers = nn.InProcess(1).rank(0) if d.some(0.3) else None
    return ops.weighted_batch_norm(d.x(), d.channels(), d.channels(), d.number(1e-5),
                                   mask=d.mask(), workers=workers)


def linear_batch_norm(d):
    N, K = (*d.shape, 1, 1)[:2]
    C = int(d.rng.integers(1, 20))
    gamma, beta, bias = (d.scale((C,)) for _ in range(3))
    running = (None, None) if d.some(0.3) else (d.tensor((C,), d.own, 0.0),
                                                d.tensor((C,), d.own, 0.0))
    return ops.linear_batch_norm(d.tensor((N, K)), d.tensor((C, K)),
                                 bias if d.dtype == d.own else None, *running, gamma, beta,
                                 d.number(0.1), d.number(1e-5),
                                 d.choice((None, "relu", "sigmoid", "tanh", d.number("relu"))))


def ghost_batch_norm(d):
    """Some with a gamma and beta of each ghost."""
    size = d.number(int(d.rng.integers(1, 5)))
    N = d.shape[0] if d.shape else 0
    apart = d.flag() and isinstance(size, int) and size > 0
    own = (-(-N // size) + d.odd(0.1), *d.shape[1:2]) if apart else d.shape[1:2]
    return ops.ghost_batch_norm(d.x(), size, d.scale(own), d.scale(own), d.number(1e-5))


def lp_batch_norm(d):
    return ops.lp_batch_norm(d.x(), d.channels(), d.channels(), d.number(d.choice(POWERS)),
                             d.number(1e-5), centered=d.flag())


def lp_deviation(d):
    return ops.lp_deviation(d.x(), d.number(d.choice(POWERS)), d.number(1e-5),
                            centered=d.flag())[1]


def moments(d):
    groups, ghosts = d.groups() if d.some(0.3) else d.number(None), d.number(None)
    if (groups is None and d.some(0.3)) or d.odd():
        ghosts = int(d.rng.integers(1, 5))
    return ops.moments(d.x(), groups=groups, ghost_size=ghosts, mask=d.mask())


def _rows(d, dims):
    """As many of the last lengths, most often those of a sample."""
    own = d.shape[len(d.shape) - dims:]
    return own, own if not d.odd() else d.number(own)


def layer_norm(d):
    own, said = _rows(d, int(d.rng.integers(1 if d.sane else 0, 3)))
    return F.layer_norm(d.x(), said, d.scale(own), d.scale(own), d.number(1e-5))


def rms_norm(d):
    own, said = _rows(d, int(d.rng.integers(1 if d.sane else 0, 3)))
    return F.rms_norm(d.x(), said, d.scale(own), d.number(None))


def group_norm(d):
    return F.group_norm(d.x(), d.groups(), d.channels(), d.channels(), d.number(1e-5))


def instance_norm(d):
    d.fit((3, 4, 5))
    by_input = d.flag()
    return F.instance_norm(d.x(), *d.running(needed=not by_input), d.channels(), d.channels(),
                           by_input, d.number(0.1), d.number(1e-5))


def local_response_norm(d):
    d.fit((3, 4, 5))
    return F.local_response_norm(d.x(), d.number(int(d.rng.integers(1, 9))), d.number(1e-4),
                                 d.number(0.75), d.number(1.0))


def filter_response_norm(d):
    d.fit((3, 4, 5))
    return ops.filter_response_norm(d.x(), d.channels(), d.channels(), d.channels(),
                                    d.number(1e-6), d.channels() if d.some(0.3) else None)


def normalize(d):
    return F.normalize(d.x(), d.number(d.choice((1, 2, 2, 3, 2.5, math.inf))),
                       d.number(int(d.rng.integers(-2, 2 if d.sane else 3))), d.number(1e-12))


def norm(d):
    return ops.norm(d.x(), d.number(d.choice((1, 2, 2, 3, 2.5, math.inf, "fro"))),
                    d.number(d.choice((None, 0, 1, -1, (0, 1)))), d.flag())


def global_response_norm(d):
    d.fit((3, 4, 5))
    return ops.global_response_norm(d.x(), d.channels(not d.odd()), d.channels(not d.odd()),
                                    d.number(1e-6))


def evonorm_s0(d):
    return ops.evonorm_s0(d.x(), d.groups(), d.channels(), d.channels(), d.channels(),
                          d.number(1e-5))


def evonorm_b0(d):
    return ops.evonorm_b0(d.x(), d.channels(), d.channels(), d.channels(), d.kept(),
                          d.number(1e-5))


def switchable_norm(d):
    d.fit((3, 4, 5))
    batch = (d.kept(), d.kept()) if d.some(0.3) else d.number(None)
    return ops.switchable_norm(d.x(), d.tensor((3,)), d.tensor((3,)), d.channels(), d.channels(),
                               d.number(1e-5), batch)


def whiten(d):
    return ops.whiten(d.x(), d.groups(), d.number(1e-3), d.channels(), d.channels())


def inverse_sqrt(d):
    n = int(d.rng.integers(1 if d.sane else 0, 5))
    a = d.tensor((n, n))
    if isinstance(a, nbgrad.Tensor) and a.shape == (n, n) and not d.odd():
        a = a @ a.T
    return ops.inverse_sqrt(a)


def center(d):
    return ops.center(d.x(), *([d.channels()] if d.flag() else []))


def channel_std(d):
    return ops.channel_std(d.x(), eps=d.number(1e-5))


def channel_rms(d):
    return ops.channel_rms(d.x(), eps=d.number(1e-5))


def channel_size(d):
    return ops.channel_size(d.x())


def channel_dot(d):
    return ops.channel_dot(d.x(), d.x())


def channel_sums(d):
    return ops.channel_sums(d.x(), d.x(), d.kept())


def divide_channels(d):
    return ops.divide_channels(d.x(), d.kept(), d.kept(False), d.kept(False))


def at_least(d):
    return ops.at_least(d.x(), d.kept())


def weight_norm(d):
    dim = int(d.rng.integers(0, min(3, len(d.shape)) if d.sane else 3))
    g = tuple(n if i == dim else 1 for i, n in enumerate(d.shape))
    if d.some(0.2):
        dim, g = d.choice((None, -1)), ()
    return ops.weight_norm(d.x(), d.tensor(g), d.number(dim))


def weight_standardization(d):
    return ops.weight_standardization(d.x(), d.number(1e-5), d.number(int(d.rng.integers(0, 2))))


def _parametrized(d, how, **settings):
    """The weight of a module under a parametrization, read once or twice, and as it is left."""
    kind = d.choice((nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d))
    sizes = d.rng.integers(1, 9, 2 if kind is nn.Linear else 3).tolist()
    module = kind(*sizes, dtype=d.own if d.own.kind in "fV" else np.float32).train(d.flag())
    with np.errstate(all="ignore"):
        module.weight.data[...] *= 10.0 ** int(d.choice((0, 0, 1, -20, 15))) * d.some(0.95)
    name = d.number(d.choice(("weight", "weight", "weight", "bias")))
    own = {key: d.size(value) for key, value in settings.items() if d.some(0.5)}
    how(module, name, **own)
    for _ in range(d.rng.integers(0, 2)):
        getattr(module, name)
    if d.some(0.2):
        parametrize.remove_parametrizations(module, name, leave_parametrized=not d.odd(0.3))
    return getattr(module, name)


def parametrized_spectral_norm(d):
    return _parametrized(d, parametrizations.spectral_norm, dim=d.choice((0, 0, 0, 1)), eps=1e-12,
                         n_power_iterations=d.choice((1, 2, 5)))


def parametrized_weight_norm(d):
    return _parametrized(d, parametrizations.weight_norm, dim=d.choice((0, 0, -1, None, 1)))


def parametrized_weight_standardization(d):
    return _parametrized(d, parametrizations.weight_standardization, eps=1e-5,
                         dim=d.choice((0, 0, 0, 1)))


def create_norm(d):
    """A norm by name, called once."""
    d.fit((2, 3, 4, 5))
    _, C, *S = (*d.shape, 2, 2)[:max(len(d.shape), 2)]
    name = d.number(d.choice(NAMES))
    own = {"size": S} if name in ("layer", "rms") or d.flag() else {"dims": d.number(len(S))}
    layer = nn.create_norm(name, d.size(C), **own).train(d.flag())
    return layer(d.x())


# ----------------------------------------------------------------------------------------- layers

LAYERS = [
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GhostBatchNorm, nn.SplitBatchNorm,
    nn.SyncBatchNorm, nn.BatchRenorm, nn.FrozenBatchNorm, nn.NoisyBatchNorm, nn.LpBatchNorm,
    nn.MeanOnlyBatchNorm, nn.DecorrelatedBatchNorm, nn.SwitchableNorm, nn.EvoNormB0,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.EvoNormS0, nn.FilterResponseNorm,
    nn.GlobalResponseNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.GroupNorm, nn.TLU,
    nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d, nn.LazyInstanceNorm1d,
    nn.LazyInstanceNorm2d, nn.LazyInstanceNorm3d]
SPATIAL = (nn.FilterResponseNorm, nn.GlobalResponseNorm, nn.SwitchableNorm, nn.LocalResponseNorm)


@cache
def _dims(kind):
    """The numbers of dimensions that a layer takes."""
    if hasattr(kind, "_ndim"):
        return kind._ndim, kind._ndim - 1
    return getattr(kind, "_ndims", (3, 4, 5) if kind in SPATIAL else (2, 3, 4, 5))


@cache
def _known(kind):
    """The arguments of a layer's constructor, also those that it hands on."""
    return {name for k in kind.__mro__ if "__init__" in vars(k)
            for name in inspect.signature(k.__init__).parameters}


def _settings(d, size):
    """A constructor's arguments: half of them as they are without being named, policies mixed."""
    averages = nn.Exponential(0.5), nn.DebiasedExponential(0.9), nn.Cumulative()
    N = d.shape[0] if d.shape else 1
    always = {"ghost_size": int(d.rng.integers(1, 5)),
              "num_splits": d.choice([k for k in range(2, 6) if N % k == 0] or [2, 2, 3]),
              "p": d.choice(POWERS), "groups": d.divisor(size), "group_size": d.divisor(size),
              "dtype": d.own if d.own.kind in "fV" else np.dtype(np.float32)}
    policies = {"statistics": d.choice(("batch", "running", "frozen", "population", "prediction")),
                "correction": d.choice((0, 1)), "update": d.choice(("forward", "step")),
                "on_nonfinite": d.choice(("propagate", "skip_update", "raise")),
                d.choice(("like", "average", "momentum")): None}
    for name, of in (("like", ("torch", "keras")), ("average", averages), ("momentum", (0.1, 1))):
        if name in policies:
            policies[name] = d.choice(of)
    others = {"affine": d.flag(), "bias": d.flag(), "track_running_stats": d.flag(),
              "centered": d.flag(), "learn_eps": d.flag(), "tlu": d.flag(), "r_max": 3.0,
              "d_max": 5.0, "workers": nn.InProcess(1).rank(0), "generator": nbgrad.Generator(0),
              "mean_range": 0.5, "alpha": 1e-4, "activation": d.flag()}
    if "like" not in policies:
        others["eps"] = 1e-5
    return always, {name: value for name, value in {**policies, **others}.items() if d.some(0.3)}


def _made(d, kind):
    """A layer for the shape."""
    at = len(d.shape) - kind._ndim + 1 if hasattr(kind, "_ndim") else 1
    size = d.shape[at] if -1 < at < len(d.shape) else 1
    if kind in (nn.LayerNorm, nn.RMSNorm):
        size = d.shape[-1] if d.shape and d.flag() else d.shape[1:] or 1
    channels = size if isinstance(size, int) else 1
    own = {name: value if name == "dtype" and not d.odd(0.02) else d.size(value)
           for part in _settings(d, channels) for name, value in part.items()
           if name in _known(kind)}
    first = [d.groups()] if kind is nn.GroupNorm else []
    return kind(*first, *([] if issubclass(kind, Lazy) else [d.size(size)]), **own)


def _layer(d, kind):
    """One to three calls of a layer, the earlier ones in the same step of an optimizer or not."""
    d.fit(_dims(kind))
    if kind is nn.SplitBatchNorm and d.sane and d.shape[0] == 1:
        d.shape = 4, *d.shape[1:]
    for left in reversed(range(5 if d.sane else 1)):
        try:
            layer = _made(d, kind).train(d.flag())
            break
        except DOCUMENTED:                            # policies that exclude each other: others
            if not left:
                raise
    known = inspect.signature(layer.forward).parameters
    how = {}
    if "mask" in known and d.flag() and not (
            d.sane and kind in (nn.GhostBatchNorm, nn.SplitBatchNorm)):
        how["mask"] = d.mask()
    if "residual" in known and d.some(0.2):
        how |= {"residual": d.x(), "activation": d.choice((None, "relu", d.number("relu")))}
    for _ in range(d.rng.integers(0, 3)):
        layer(d.x())
        if d.flag():
            step_taken()
        layer.train(d.flag())
    return layer(d.x(), **how)


def _calls_of(kind):
    def call(d):
        return _layer(d, kind)
    call.__name__ = kind.__name__
    return call


FUNCTIONS = [
    batch_norm, weighted_batch_norm, linear_batch_norm, ghost_batch_norm, lp_batch_norm,
    lp_deviation, moments, layer_norm, rms_norm, group_norm, instance_norm, local_response_norm,
    filter_response_norm, normalize, norm, global_response_norm, evonorm_s0, evonorm_b0,
    switchable_norm, whiten, inverse_sqrt, center, channel_std, channel_rms, channel_size,
    channel_dot, channel_sums, divide_channels, at_least, weight_norm, weight_standardization,
    parametrized_spectral_norm, parametrized_weight_norm, parametrized_weight_standardization,
    create_norm, *map(_calls_of, LAYERS)]
