"""The one jit policy: how a loop becomes machine code, where it is cached, when it is parallel.

A kernel is a Python function over arrays, compiled for a signature when that is first needed: of
tasks (tasks.py), once for serial and parallel runs, or with ``prange`` on its outer loop, for each.
``work`` (bytes that the call reads and writes) decides how it runs. It must give the same bits
either way: cut data by size, never by thread, and merge partial results in index order.

A kernel compiles fast if its tasks are one call of a device function, and if device functions take
pointers and numbers: passes over a loop cost more than in proportion to its length.
"""

import hashlib
import os
import sys
import tempfile
import threading
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, cached_property
from pathlib import Path
from time import perf_counter

import llvmlite
import numba
from numba import config, njit, prange
from numba.core import event
from numba.core.caching import FunctionCache, IndexDataCacheFile

from ..libraries import KernelCompiler, ParallelCompiler
from ..polynomials import POLICY, device
from ..quiet import quiet

try:
    import fcntl
except ImportError:                  # Windows
    fcntl = None

__all__ = ["Kernel", "cache_dir", "device", "get_num_threads", "kernel", "machine", "notify",
           "prange", "set_num_threads", "threading_layer"]

# A parallel region costs 1.5 us entered hot, more when the workers sleep; 1 MB is about 35 us of
# one core at 29 GB/s. Below, two cores win little and lose much where the machine has other work.
PARALLEL_BYTES = 1 << 20
LARGE_BYTES = 1 << 25                # 1 ms and more: worth sharing out even if a worker comes late
STALL_SECONDS, SLOW_BYTES_PER_SECOND, CALM_SECONDS = 2e-3, 2e9, 0.3
_crowded_until = 0.0


def _source_key():
    """Hash of every kernel source and of the compiler: Numba's own key misses edits in callees, and
    whether indices are checked."""
    root = Path(__file__).resolve().parent.parent
    versions = (f"{numba.__version__} {llvmlite.__version__} {sys.version_info[:2]}"
                f"{' checked' if config.BOUNDSCHECK else ''}")
    h = hashlib.sha256(versions.encode())
    for path in sorted(root.rglob("*.py")):
        h.update(path.read_bytes())
    return h.hexdigest()[:16]


def _writable(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False


@cache
def cache_dir():
    """Folder of the compiled kernels, or None where no writable one was found."""
    base = config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(base).expanduser() / "nbgrad" / _source_key()
    return path if _writable(path) else None


class _Files(IndexDataCacheFile):
    """A file for each key, named after it. Numba numbers them and writes the numbers to an index:
    two processes that compile at the same time take one number for two kernels, and from then on
    one of these is the other."""

    def __init__(self, folder, stem):
        super().__init__(folder, stem, None)
        self._stem = stem

    def name(self, key):
        return f"{self._stem}.{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.nbc"

    def save(self, key, data):
        self._save_data(self.name(key), data)

    def load(self, key):
        try:
            return self._load_data(self.name(key))
        except OSError:
            return None

    def holds(self, key):
        return os.path.exists(os.path.join(self._cache_path, self.name(key)))


class _Cache(FunctionCache):
    """Numba's disk cache under our folder. The folder's name already covers every source, so the
    key is signature, CPU and kernel: closure cells are left out, since a jitted function in a cell
    pickles differently in every process and such a kernel would never be found again."""

    def __init__(self, py_func, name):
        self._kernel_name = name
        saved, config.CACHE_DIR = config.CACHE_DIR, str(cache_dir())
        try:
            super().__init__(py_func)
        finally:
            config.CACHE_DIR = saved
        self._cache_file = _Files(self._cache_path, self._impl.filename_base)
        self._lock = cache_dir() / f"{self._cache_file.name(name)}.lock"

    def _index_key(self, sig, codegen):
        return sig, codegen.magic_tuple(), self._kernel_name

    def once(self, compiles, context):
        """compile(sig) of a dispatcher, at which processes take turns: what one has compiled, the
        others load. Loading takes no turns. Kernels are not compiled inside kernels, so nobody
        holds one turn and waits for another."""
        def compile(sig):
            if self._cache_file.holds(self._index_key(sig, context.codegen())):
                return compiles(sig)
            with _turn(self._lock):
                return compiles(sig)
        return compile


@contextmanager
def _turn(path):
    """Alone with this file among processes and threads, where files can be locked."""
    with ExitStack() as stack:
        with suppress(OSError):
            file = stack.enter_context(open(path, "ab"))
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)        # a forked child has the file open, too, so
                stack.callback(fcntl.flock, file, fcntl.LOCK_UN)     # closing it is not enough
        yield


def _compile(loop, name, parallel, options):
    if config.DISABLE_JIT:
        return quiet(loop)
    how = {"pipeline_class": ParallelCompiler if parallel else KernelCompiler, "parallel": parallel}
    jitted = njit(no_cfunc_wrapper=True, **how, **{**POLICY, **options})(loop)
    if cache_dir() is not None:
        jitted._cache = _Cache(loop, f"{name} {parallel}")
        jitted.compile = jitted._cache.once(jitted.compile, jitted.targetctx)
    return jitted


class Kernel:
    """A loop nest over arrays. ``k(*args, work=bytes)`` runs it serial or parallel."""

    def __init__(self, loop, name=None, **options):
        self.loop, self.options = loop, options
        self.name = f"{loop.__module__.rpartition('.')[2]}.{name or loop.__name__}"
        self.__doc__ = loop.__doc__
        _names.add(loop.__qualname__)

    @cached_property
    def serial(self):
        return _compile(self.loop, self.name, False, self.options)

    @cached_property
    def parallel(self):
        return _compile(self.loop, self.name, True, self.options)

    def __call__(self, *args, work=0):
        if work < PARALLEL_BYTES or _threads == 1:
            return self.serial(*args)
        start = perf_counter()
        if work < LARGE_BYTES and start < _crowded_until:
            return self.serial(*args)
        run = self.parallel
        known = len(run.overloads)
        lock = _lock
        if lock is None:
            out = run(*args)
        else:
            with lock:
                out = run(*args)
                _settle_layer()
        if len(run.overloads) == known:          # compiling or loading is no stall
            _watch(perf_counter() - start, work)
        return out


def _watch(seconds, work):
    """Where other processes hold the cores, a region waits for a worker's next time slice: 4 to 30
    ms for 0.1 ms of work. After such a stall, small regions run serial for a while: the bits are
    the same."""
    global _crowded_until
    if seconds > STALL_SECONDS + work / SLOW_BYTES_PER_SECOND:
        _crowded_until = perf_counter() + CALM_SECONDS


def kernel(loop=None, **options):
    """Decorator: make a ``Kernel`` of a loop nest, with extra jit options for this one."""
    return Kernel(loop, **options) if loop else lambda f: Kernel(f, **options)


# Threads. `workqueue` aborts the process when two Python threads enter at once, so entries are
# serialised until the layer is known and for good if it is that one. `omp` kills a forked child
# that enters a parallel region, so a child runs serial kernels.
_threads = 1 if config.DISABLE_JIT else config.NUMBA_NUM_THREADS
_lock = threading.RLock()


def _settle_layer():
    global _lock
    if config.DISABLE_JIT or threading_layer() != "workqueue":
        _lock = None


def _serial_in_child():
    global _threads, _lock
    _threads, _lock = 1, threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_serial_in_child)


def machine():
    """CPU name as LLVM knows it, its vector features, and the number of cores."""
    from llvmlite import binding

    wanted = "avx512f", "avx512bf16", "avx2", "fma", "neon", "sve"
    features = binding.get_host_cpu_features()
    return {"cpu": binding.get_host_cpu_name(),
            "features": [f for f in wanted if features.get(f)],
            "cores": os.cpu_count()}


def threading_layer():
    """Name of Numba's threading layer, or None before the first parallel kernel."""
    try:
        return numba.threading_layer()
    except ValueError:
        return None


def get_num_threads():
    """Number of threads that parallel kernels use."""
    return _threads


def set_num_threads(n):
    """Use n threads in parallel kernels; results do not depend on n."""
    global _threads
    if not 1 <= n <= config.NUMBA_NUM_THREADS:
        raise ValueError(f"set_num_threads: expected 1 to {config.NUMBA_NUM_THREADS}, got {n}")
    if not config.DISABLE_JIT:
        numba.set_num_threads(n)
    _threads = n


# Compilation is the one pause a user may wonder about: say so, once, and where it is kept.
_names = set()
_said = False
_say = False


def notify(on=True):
    """Write a line to stderr when a kernel is compiled (the default on a terminal)."""
    global _say
    _say = on


class _Listener(event.Listener):
    def on_start(self, event):
        global _said
        heard = not _said and (_say or sys.stderr.isatty())
        if heard and event.data["dispatcher"].py_func.__qualname__ in _names:
            _said = True
            folder = cache_dir()
            where = f"kept in {folder}" if folder else "no writable cache folder: not kept"
            print(f"nbgrad: compiling kernels for this CPU, once ({where})", file=sys.stderr)

    def on_end(self, event):
        pass


event.register("numba:compile", _Listener())
