"""The same bits for every number of threads and both threading layers; after a fork, in a spawned
process, and with eight Python threads at once.

Run as a script, this file prints what the tests look at, as JSON: one process for each layer.
"""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from nbgrad.kernels import cpu
from nbgrad.kernels.cpu import epilogue

LAYERS = ["omp", "workqueue"]
THREADS = [8, 3, 2, 1]
PLAIN = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
WINDOW = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "ceil_mode": False}
MEAN = {**WINDOW, "count_include_pad": True, "divisor_override": None}
EPS = 1e-5


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def images(*shape):
    """(N, C, H, W) in channels-last memory."""
    n, c, h, w = shape
    return normal(n, h, w, c).transpose(0, 3, 1, 2)


def steps(name, states, **how):
    """An optimizer step on copies; what it leaves."""
    p, *rest = ([normal(n)] for n in (300_000,) * (states + 2))
    rest = [[np.abs(a) for a in state] for state in rest]
    getattr(cpu, name)(p, *rest, lr=0.1, weight_decay=0.1, **how)
    return p[0], *(state[0] for state in rest)


def products():
    a, b, rows = normal(700, 130), normal(130, 310), normal(5000, 77)
    x, w = images(8, 20, 33, 31), normal(40, 20, 3, 3)
    strided, grouped = {**PLAIN, "stride": (2, 2)}, {**PLAIN, "groups": 20}
    y, z, each = images(8, 40, 33, 31), images(8, 40, 17, 16), normal(20, 1, 3, 3)
    yield "matmul", lambda: cpu.matmul(a, b)
    yield "matmul aᵀ b", lambda: cpu.matmul(rows.T, rows)
    yield "linear", lambda: cpu.linear(a, normal(310, 130), normal(310))
    yield "linear_backward", lambda: cpu.linear_backward(
        normal(5000, 33), rows, normal(33, 77), input_gradient=True)
    some, layer, ones = normal(60, 784), normal(100, 784), np.ones(100)
    for f in ("relu", "tanh"):
        yield f"linear_batch_norm {f}", lambda f=f: cpu.linear_batch_norm(
            some, layer, normal(100), normal(100), None, eps=EPS, activation=f)
        yield f"linear_batch_norm_backward {f}", lambda f=f: cpu.linear_batch_norm_backward(
            normal(60, 100), some, layer, normal(100), normal(60, 100), normal(60, 100), ones, ones,
            activation=f, input_gradient=True)
    yield "conv2d", lambda: cpu.conv2d(x, w, normal(40), **PLAIN)
    for name, weight, how in (("", w, PLAIN), (" 1x1", normal(40, 20, 1, 1), strided),
                              (" depthwise", each, grouped)):
        yield f"conv2d moments{name}", lambda weight=weight, how=how: moments(x, weight, how)
    yield "conv2d 1x1", lambda: cpu.conv2d(x, normal(40, 20, 1, 1), None, **strided)
    yield "conv2d depthwise", lambda: cpu.conv2d(x, each, None, **grouped)
    yield "conv2d_input", lambda: cpu.conv2d_input(y, w, input_size=x.shape, **PLAIN)
    yield "conv2d_input stride 2", lambda: cpu.conv2d_input(z, w, input_size=x.shape, **strided)
    yield "conv2d_input depthwise", lambda: cpu.conv2d_input(
        x, each, input_size=x.shape, **grouped)
    yield "conv2d_weight", lambda: cpu.conv2d_weight(y, x, kernel_size=(3, 3), **PLAIN)
    yield "conv2d_weight depthwise", lambda: cpu.conv2d_weight(
        x, x, kernel_size=(3, 3), **grouped)


def moments(x, weight, how):
    """Statistics that a convolution takes of its output."""
    found = []
    cpu.conv2d(x, weight, None, moments=found, **how)
    assert len(found) == 3
    return tuple(found)


def statistics():
    wide, stats, gain = normal(3000, 130), np.full(130, 0.5), normal(130)
    for name, x in (("rows", wide), ("planes", normal(40, 7, 33, 31)),
                    ("channels last", images(40, 7, 33, 31))):
        C = x.shape[1]
        yield f"batch_norm {name}", lambda x=x, C=C: cpu.batch_norm(x, gain[:C], None, eps=EPS)
        yield f"batch_norm_backward {name}", lambda x=x, C=C: cpu.batch_norm_backward(
            x, x, gain[:C], stats[:C], stats[:C])
    yield "layer_norm", lambda: cpu.layer_norm(wide, gain, None, dims=1, eps=EPS)
    yield "layer_norm_backward", lambda: cpu.layer_norm_backward(
        wide, wide, gain, np.zeros(3000), np.ones(3000), dims=1)
    for axis in (0, 1):
        yield f"softmax {axis}", lambda a=axis: cpu.softmax(wide, axis=a)
        yield f"log_softmax {axis}", lambda a=axis: cpu.log_softmax(wide, axis=a)
        yield f"softmax_backward {axis}", lambda a=axis: cpu.softmax_backward(wide, wide, axis=a)
        yield f"log_softmax_backward {axis}", lambda a=axis: cpu.log_softmax_backward(
            wide, wide, axis=a)
    loss = {"ignore_index": 3, "label_smoothing": 0.1}
    target = np.arange(3000) % 130
    yield "cross_entropy", lambda: cpu.cross_entropy(wide, target, None, **loss)
    yield "cross_entropy_backward", lambda: cpu.cross_entropy_backward(
        normal(3000), wide, target, None, **loss)


def the_others():
    x, wide, dy = images(8, 20, 63, 61), normal(3000, 130), images(8, 20, 32, 31)
    long = normal(400, 1031)
    _, indices = cpu.max_pool2d(x, dilation=(1, 1), **WINDOW)
    yield "max_pool2d", lambda: cpu.max_pool2d(x, dilation=(1, 1), **WINDOW)
    yield "max_pool2d_backward", lambda: cpu.max_pool2d_backward(dy, indices, input_size=x.shape)
    yield "max_pool2d_gather", lambda: cpu.max_pool2d_gather(x, indices)
    yield "avg_pool2d", lambda: cpu.avg_pool2d(x, **MEAN)
    yield "avg_pool2d_backward", lambda: cpu.avg_pool2d_backward(dy, input_size=x.shape, **MEAN)
    yield "adaptive_avg_pool2d", lambda: cpu.adaptive_avg_pool2d(x, output_size=(5, 4))
    yield "adaptive_avg_pool2d_backward", lambda: cpu.adaptive_avg_pool2d_backward(
        dy, input_size=x.shape)
    for axes, source in ((None, x), (0, wide), (1, long), ((0, 2, 3), x)):
        yield f"sum {axes}", lambda s=source, a=axes: cpu.sum(s, axes=a, keepdims=False)
    yield "gelu", lambda: cpu.gelu(wide)
    yield "silu_backward", lambda: cpu.silu_backward(wide, wide)
    yield "add", lambda: cpu.add(normal(1000, 1000), normal(1000, 1000))
    yield "sgd_step", lambda: steps("sgd_step", 1, momentum=0.9, dampening=0, nesterov=True,
                                    first=[False])
    yield "adam_step", lambda: steps("adam_step", 2, beta1=0.9, beta2=0.99, eps=1e-8,
                                     decoupled=True, steps=[3])


def calls():
    """One or more calls of every family, over a megabyte of work each, as name: function."""
    return {**dict(products()), **dict(statistics()), **dict(the_others())}


def bits(out):
    """A hash of one array or several."""
    arrays = out if isinstance(out, tuple) else (out,)
    data = b"".join(np.asarray(a).tobytes() for a in arrays if a is not None)
    return hashlib.sha256(data).hexdigest()[:16]


class Entries:
    """Counts the kernels that ran parallel. It stands in for the watch that sends small calls to
    the serial code after a stall, as there are many with more threads than cores."""

    def __init__(self):
        self.count = 0
        cpu.jit._watch = self

    def __call__(self, *args):
        self.count += 1

    def of(self, f):
        before = self.count
        f()
        return self.count - before


def with_eight_python_threads(work, serial):
    """Names of calls that gave other bits when eight Python threads made them all at once."""
    wrong, names = [], sorted(work)

    def run(first):
        for i in range(len(names)):                # each thread is at another call
            name = names[(first + i) % len(names)]
            if bits(work[name]()) != serial[name]:
                wrong.append(name)

    threads = [threading.Thread(target=run, args=(i * len(names) // 8,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return wrong


def in_a_child(work):
    """Exit status of a forked child that computes everything again."""
    serial = {name: bits(f()) for name, f in work.items()}
    child = os.fork()
    if not child:
        os._exit(0 if {name: bits(f()) for name, f in work.items()} == serial else 3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def spawned(name):
    """The bits of one call in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(of_one_call, (name,))


def of_one_call(name):
    return bits(calls()[name]())


def report():
    epilogue.LEAST_BYTES = epilogue.SHARE = 0      # moments of outputs of any size
    work, entries, found = calls(), Entries(), {}
    for n in THREADS:
        cpu.jit.set_num_threads(n)
        found[str(n)] = {name: bits(f()) for name, f in work.items()}
    cpu.jit._threads = 2                           # the parallel code, by one thread
    found["parallel code on one thread"] = {name: bits(f()) for name, f in work.items()}
    cpu.jit.set_num_threads(THREADS[0])
    found["parallel"] = {name: entries.of(f) for name, f in work.items()}
    found["layer"] = cpu.jit.threading_layer()
    found["wrong in Python threads"] = with_eight_python_threads(work, found["1"])
    found["child"] = in_a_child(work)
    found["spawned"] = spawned("matmul")
    return found


@pytest.fixture(scope="module")
def reports():
    """What this file prints as a script, for each layer."""
    found = {}
    for layer in LAYERS:
        out = subprocess.run(
            [sys.executable, "-W", "ignore::DeprecationWarning", __file__], text=True,
            capture_output=True, timeout=600,
            env={**os.environ, "NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "8"})
        assert out.returncode == 0, out.stderr
        found[layer] = json.loads(out.stdout)
    return found


pytestmark = pytest.mark.skipif(sys.platform != "linux" or cpu.jit.config.DISABLE_JIT,
                                reason="fork, and Numba's omp layer, as on Linux; compiled kernels")


def test_both_layers_were_used_and_every_call_was_parallel(reports):
    for layer, found in reports.items():
        assert found["layer"] == layer
        assert [name for name, count in found["parallel"].items() if not count] == []


def test_the_bits_are_those_of_one_thread_for_any_number_of_threads_and_either_layer(reports):
    expected = reports["omp"]["1"]
    assert len(expected) > 40
    for found in reports.values():
        for way in ("8", "3", "2", "1", "parallel code on one thread"):
            assert found[way] == expected


def test_eight_python_threads_at_once_get_the_same_bits(reports):
    assert [reports[layer]["wrong in Python threads"] for layer in LAYERS] == [[], []]


def test_a_child_forked_after_use_computes_the_same(reports):
    assert [reports[layer]["child"] for layer in LAYERS] == [0, 0]


def test_a_spawned_process_computes_the_same(reports):
    for found in reports.values():
        assert found["spawned"] == found["1"]["matmul"]


if __name__ == "__main__":
    print(json.dumps(report()))
