"""The one way a CUDA kernel becomes machine code and is run.

A kernel's parameters are addresses and numbers, never arrays: Numba's dispatcher takes 1.6 us per
array and 0.7 per number, and its own 4. Here a kernel is compiled once per compute capability, to
PTX and by nvJitLink to machine code, kept on disk and started through CuPy's driver functions with
its parameters packed by ``struct``: 1 us for two parameters, 2.3 for 25, in which each array is
looked at. Compiling needs no GPU: ``offline.py`` does all of it.
"""

import ctypes
import os
import re
import struct
import tempfile
import threading
from contextlib import contextmanager
from functools import cache, partial, wraps
from itertools import islice

import numpy as np
from numba import types

from ..cpu.jit import cache_dir
from ..half import kind as kind_of
from . import graphs, simulator
from .intrinsics import HALVES
from .memory import SIMULATED, Array, gapless, synchronize, xp

__all__ = ["KERNELS", "Kernel", "debug", "factory", "processors"]

# Per type of a parameter: Numba's type, struct's letter; "*" before it is an address, which may
# also be one of halves, "*f2" and "*bf": they are read and written as float32.
_NUMBERS = {"f4": (types.float32, "f"), "f8": (types.float64, "d"), "i4": (types.int32, "i"),
            "i8": (types.int64, "q"), "u4": (types.uint32, "I"), "u8": (types.uint64, "Q"),
            "u1": (types.uint8, "B"), "b1": (types.boolean, "?")}
KERNELS = {}                 # by name: what offline.py compiles
DEFAULT_SHARED = 48 << 10    # bytes; beyond, a kernel must be told once what it may use
debug = bool(os.environ.get("NBGRAD_CUDA_DEBUG"))      # look for errors after each launch


def _numba(kind):
    if kind[0] != "*":
        return _NUMBERS[kind][0]
    return HALVES[kind[1:]] if kind[1:] in HALVES else types.CPointer(_NUMBERS[kind[1:]][0])


class Kernel:
    """``k(blocks, *args)`` runs ``body`` on so many blocks of ``threads`` threads.

    ``parameters`` is a type for each: "*f4 *f4 i8"; "4x*f4" are four that ``body`` has as a tuple.
    Arrays are given for addresses (None: null), of that dtype, on the current device and without
    gaps; ``strided``: they may have gaps.
    ``minimum`` blocks of it must fit on a multiprocessor, which bounds its registers; on devices of
    compute capability ``alone`` and above one is enough.
    ``together``: all blocks must be there at once, since they wait for each other.
    ``least``: the compute capability that it needs; with bfloat16 at least 8.0.
    """

    def __init__(self, body, parameters, *, name, threads=256, shared=0, minimum=None,
                 alone=None, together=False, least=(0, 0), strided=False):
        self.body, self.name = body, name
        # (how many, or 0 for one that is no tuple; of what), and one by one
        self._groups = [(int(n or 0), kind) for n, kind in
                        re.findall(r"(?:(\d+)x)?(\S+)", parameters)]
        self.kinds = [kind for n, kind in self._groups for _ in range(n or 1)]
        self.threads, self.shared, self.minimum = threads, shared, minimum
        self.alone = alone or (99, 0)
        self.together, self.least = together, max(least, (8, 0) if "*bf" in self.kinds else (0, 0))
        layout = "".join("P" if k[0] == "*" else _NUMBERS[k][1] for k in self.kinds)
        self._struct = struct.Struct("@" + layout)
        self._offsets = [struct.calcsize("@" + layout[:i + 1]) - struct.calcsize("@" + c)
                         for i, c in enumerate(layout)]
        # which parameters are arrays, and the dtypes as CuPy has them, once a launch has shown them
        self._arrays = [(i, None) for i, k in enumerate(self.kinds) if k[0] == "*"]
        self._strided, self._local, self._loaded = strided, threading.local(), {}
        if name in KERNELS:
            raise ValueError(f"there is already a kernel called {name!r}")
        KERNELS[name] = self

    def __repr__(self):
        return f"<cuda kernel {self.name}>"

    def __call__(self, blocks, *args):
        if not blocks:
            return
        if len(args) != len(self.kinds):
            raise TypeError(f"{self.name}: {len(self.kinds)} parameters, got {len(args)}")
        if SIMULATED:
            call = partial(simulator.run, self.body, blocks, self.threads, self._simulated(args),
                           self.shared, self.together)
            call() if graphs.state.capture is None else graphs.state.capture.launch(call)
            return
        if graphs.state.capture is not None:
            graphs.state.capture.hold(args)
        number = xp.cuda.runtime.getDevice()
        self._start(number, blocks, self._numbers(number, args))

    def _numbers(self, number, args):
        """Addresses and numbers, of arrays that are as they must be."""
        found, strided = list(args), self._strided
        try:
            for i, dtype in self._arrays:
                a = args[i]
                if a is None:
                    found[i] = 0
                    continue
                memory = a.data          # what is read of an array takes 15 ns each; its flags, 300
                if (a.dtype is not dtype or memory.device_id != number or not (
                        a._c_contiguous or strided or gapless(a.shape, a.strides, a.itemsize))):
                    self._check(i, a, number)
                found[i] = memory.ptr
        except AttributeError:
            self._check(i, a, number)
            raise
        return found

    def _check(self, i, a, number):
        """Raise for an array that parameter i cannot be."""
        who = f"{self.name}: parameter {i + 1}"
        if type(a) is not Array:
            raise TypeError(f"{who}: expected an array on the device, got {type(a).__name__}")
        if kind_of(a.dtype) != self.kinds[i][1:]:
            raise TypeError(f"{who}: expected an array of {self.kinds[i][1:]}, got {a.dtype}")
        if not SIMULATED and a.data.device_id != number:
            raise RuntimeError(f"{who}: the array is on device {a.data.device_id}, the kernel on "
                               f"{number}, the current one (see nbgrad.cuda.device)")
        if not self._strided and not gapless(a.shape, a.strides, a.itemsize):
            raise ValueError(f"{who}: expected memory without gaps, got shape {a.shape} with "
                             f"strides {a.strides}")
        self._arrays = [(j, a.dtype if j == i else dtype) for j, dtype in self._arrays]

    def _simulated(self, args):
        for i, (kind, a) in enumerate(zip(self.kinds, args)):
            if kind[0] == "*" and a is not None:
                self._check(i, a, 0)
        self._pack([a if k[0] != "*" else 0 for k, a in zip(self.kinds, args)])
        found = iter([simulator.Pointer.of(a) if k[0] == "*" else
                      np.dtype(k).type(a) if k[0] == "f" else a for k, a in zip(self.kinds, args)])
        return [tuple(islice(found, n)) if n else next(found) for n, _ in self._groups]

    # ------------------------------------------------------------------------------ machine code

    def ptx(self, cc):
        """PTX for a compute capability such as (9, 0), with the kernel's own name as its entry."""
        from numba import cuda

        with _as_if(cc):
            code, _ = cuda.compile(self.body, cc=cc, output="ptx", **self._compiled_as())
        return self._entered(code, cc)

    def _compiled_as(self):
        kinds = [types.UniTuple(_numba(kind), n) if n else _numba(kind) for n, kind in self._groups]
        return {"sig": types.void(*kinds), "device": False, "abi": "numba",
                "launch_bounds": (self.threads, self.minimum)[:1 + (self.minimum is not None)]}

    def _entered(self, code, cc):
        if cc >= self.alone:
            code, bounds = re.subn(r"\.minnctapersm \d+", ".minnctapersm 1", code)
            if bounds != 1:
                raise RuntimeError(f"{self.name}: {bounds} bounds of blocks in its PTX")
        entry = re.search(r"\.entry\s+(\w+)", code).group(1)
        return code.replace(entry, self.name)

    def ptx_of_each(self, ccs):
        """PTX for each compute capability as ``ptx`` gives it, by one run of Numba's front end,
        which takes nine tenths of the time and does not look at the capability."""
        from numba.cuda import compiler

        with _as_if(ccs[0]), compiler.global_compiler_lock:
            library, _ = compiler._compile_pyfunc_with_fixup(self.body, cc=ccs[0],
                                                             **self._compiled_as())
        for cc in ccs:
            code, = library.get_asm_strs(cc=cc)
            yield self._entered(code, cc)

    def assemble(self, cc):
        """Machine code for a compute capability, and what the assembler says of it."""
        return assemble(self.ptx(cc), cc)

    def machine_code(self, cc):
        """Machine code from the disk cache, or made and put there."""
        folder = cache_dir()
        if folder is None:
            return self.assemble(cc)[0]
        path = folder / f"cuda.{self.name}.sm{cc[0]}{cc[1]}.{_toolkit()}.cubin"
        try:
            return path.read_bytes()
        except OSError:
            code = self.assemble(cc)[0]
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as f:
            f.write(code)
        os.replace(f.name, path)
        return code

    # ------------------------------------------------------------------------------------ running

    def function(self):
        """The kernel on the current device, as CuPy has it."""
        return self._on(xp.cuda.runtime.getDevice())[0]

    def _on(self, number):
        """The kernel on a device, which is the current one; its address there, and how many blocks
        may be there at once if they wait for each other."""
        if number not in self._loaded:
            cc = xp.cuda.Device(number).compute_capability
            cc = int(cc[:-1]), int(cc[-1])
            if cc < self.least:
                raise RuntimeError(f"{self.name} needs compute capability "
                                   f"{'.'.join(map(str, self.least))}, the device has "
                                   f"{'.'.join(map(str, cc))}")
            module, driver = xp.cuda.function.Module(), xp.cuda.driver
            module.load(self.machine_code(cc))
            f = module.get_function(self.name)
            if self.shared > DEFAULT_SHARED:
                driver.funcSetAttribute(
                    f.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self.shared)
            self._loaded[number] = f, f.ptr, self._fitting(f) if self.together else None
        return self._loaded[number]

    def _fitting(self, f):
        return processors() * xp.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
            f.ptr, self.threads, self.shared)

    def resident(self):
        """How many blocks the current device can hold at once."""
        return 4 if SIMULATED else self._fitting(self.function())

    def _pack(self, numbers):
        """The address of the parameters' addresses, a thread's own, with these values."""
        try:
            buffer, addresses = self._local.packed
        except AttributeError:
            buffer = ctypes.create_string_buffer(max(1, self._struct.size))
            base = ctypes.addressof(buffer)
            pointers = (ctypes.c_void_p * len(self._offsets))(*[base + o for o in self._offsets])
            addresses = ctypes.addressof(pointers)
            self._local.packed, self._local.pointers = (buffer, addresses), pointers
        try:
            self._struct.pack_into(buffer, 0, *numbers)
        except struct.error as e:
            raise TypeError(f"{self.name}: parameters {' '.join(self.kinds)}, got "
                            f"{numbers}: {e}") from None
        return addresses

    def _start(self, number, blocks, numbers):
        cuda, (_, f, most) = xp.cuda, self._on(number)
        addresses, stream = self._pack(numbers), cuda.get_current_stream().ptr
        if most is None:
            cuda.driver.launchKernel(f, blocks, 1, 1, self.threads, 1, 1, self.shared, stream,
                                     addresses, 0)
        elif blocks > most:
            raise RuntimeError(f"{self.name}: {blocks} blocks wait for each other, and the device "
                               f"holds {most}")
        else:
            cuda.driver.launchCooperativeKernel(f, blocks, 1, 1, self.threads, 1, 1, self.shared,
                                                stream, addresses)
        if debug and graphs.state.capture is None:
            try:
                synchronize()
            except Exception as e:
                raise RuntimeError(f"{self.name} failed on {blocks} blocks: {e}") from e


def factory(f):
    """``f`` makes a kernel of what it is given, of the same the same one. The kernel's ``recipe``
    says how: by it another process can make it, too."""
    @cache
    def made(*args, **settings):
        kernel = f(*args, **settings)
        kernel.recipe = f.__module__, f.__name__, args, settings
        return kernel
    return wraps(f)(made)


def processors():
    """Multiprocessors of the current device; a few in the simulator."""
    return 2 if SIMULATED else _processors(xp.cuda.runtime.getDevice())


@cache
def _processors(number):
    return xp.cuda.Device(number).attributes["MultiProcessorCount"]


@contextmanager
def _as_if(cc):
    """numba-cuda asks the device for its capability when it compiles a function that a kernel
    calls; here there may be none, or another one."""
    from numba.cuda import dispatcher

    class Device:
        compute_capability = cc

    before, dispatcher.get_current_device = dispatcher.get_current_device, Device
    try:
        yield
    finally:
        dispatcher.get_current_device = before


@cache
def _toolkit():
    from importlib.metadata import version

    return f"{version('numba-cuda')}-{version('nvidia-nvvm')}-{version('nvidia-nvjitlink')}"


def assemble(ptx, cc):
    """nvJitLink's machine code for PTX, and its report: registers, spills, shared memory."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    linker = Linker(ObjectCode.from_ptx(ptx.encode()),
                    options=LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}", ptxas_options="-v"))
    return bytes(linker.link("cubin").code), linker.get_info_log()
