"""Device arrays of the simulator: NumPy's in a class of their own, as strict as CuPy's."""

from functools import partial

import numpy as np

from . import graphs

__all__ = ["Array", "xp"]


class Array(np.ndarray):
    """A simulated device array: results stay on the device, also those without axes, and it does
    not mix with an array of NumPy's. While a step is captured, writes wait for the replay."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **settings):
        if any(type(x) is np.ndarray for x in inputs):
            raise TypeError(f"{ufunc.__name__}: an array on the device and one of NumPy's")
        if out is not None:
            settings["out"] = tuple(map(_bare, out))
        call = partial(getattr(ufunc, method), *map(_bare, inputs), **settings)
        if out is not None and graphs.state.capture is not None:
            graphs.state.capture.launch(call)
            return out[0] if len(out) == 1 else out
        return _result(call, inputs)

    def __array_function__(self, function, types, args, settings):
        if function not in _INDEXED and any(
                type(a) is np.ndarray for a in _given((*args, *settings.values()))):
            raise TypeError(f"{function.__name__}: an array on the device and one of NumPy's")
        if not settings.get("shape", True):                  # () is no shape to CuPy's zeros_like
            settings = {**settings, "shape": None}
        call = partial(super().__array_function__, function, types, args, settings)
        if graphs.state.capture is not None and (function in _WRITE or "out" in settings):
            graphs.state.capture.launch(call)
            return settings.get("out")
        return _result(call, _arrays((*args, *settings.values())))

    def __getitem__(self, index):
        get = super().__getitem__

        def call():
            out = get(index)
            if isinstance(out, np.ndarray):
                return out
            return get((*(index if isinstance(index, tuple) else (index,)), ...))   # a view, too
        return _result(call, [self])


def _bare(x):
    return x.view(np.ndarray) if isinstance(x, Array) else x


def _wrapped(y):
    if isinstance(y, (tuple, list)):
        return type(y)(map(_wrapped, y))
    return np.asarray(y).view(Array) if isinstance(y, (np.ndarray, np.generic)) else y


def _arrays(args):
    return (_bare(a) for a in _given(args) if isinstance(a, np.ndarray))


def _given(args):
    for a in args:
        if isinstance(a, (tuple, list)):
            yield from _given(a)
        else:
            yield a


def _result(call, inputs):
    capture = graphs.state.capture
    return _wrapped(call() if capture is None else capture.result(call, list(_arrays(inputs))))


_INDEXED = {np.take, np.copyto}     # with indices, or from an array, of NumPy
_WRITE = {np.copyto, np.put, np.putmask, np.place, np.fill_diagonal}


def _returning(name):
    plain = getattr(np.ndarray, name)

    def method(self, *args, **settings):
        return _result(partial(plain, self, *args, **settings), [self])
    setattr(Array, name, method)


def _writing(name):
    plain = getattr(np.ndarray, name)

    def method(self, *args):
        call = partial(plain, self, *args)
        return call() if graphs.state.capture is None else graphs.state.capture.launch(call)
    setattr(Array, name, method)


def _waiting(name):
    plain = getattr(np.ndarray, name)

    def method(self, *args):
        graphs.refuse(f"{name}, which waits for a value of the device,")
        return plain(self, *args)
    setattr(Array, name, method)


def _without_initial(name):
    plain = getattr(np.ndarray, name)

    def method(self, axis=None, dtype=None, out=None, keepdims=False):    # as CuPy has it
        more = {} if dtype is None else {"dtype": dtype}
        return plain(self, axis=axis, out=out, keepdims=keepdims, **more)
    setattr(Array, name, method)


for _name in ("max", "mean", "min", "prod", "sum"):
    _without_initial(_name)
for _name in ("argmax", "argmin", "argsort", "astype", "copy", "cumprod", "cumsum", "flatten",
              "nonzero", "ravel", "repeat", "reshape", "take"):
    _returning(_name)
for _name in ("__setitem__", "fill", "sort"):
    _writing(_name)
for _name in ("__bool__", "__float__", "__index__", "__int__", "item", "tobytes", "tolist"):
    _waiting(_name)


class _Numpy:
    """NumPy as CuPy is: what makes arrays makes them on the device."""

    def __getattr__(self, name):
        return getattr(np, name)

    def zeros(self, *args, **settings):
        return np.zeros(*args, **settings).view(Array)

    def ascontiguousarray(self, x):
        return x if x.flags.c_contiguous else x.copy(order="C")


xp = _Numpy()
