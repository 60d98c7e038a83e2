"""Checkpoints: nothing is lost, nothing hostile is believed, and a crash leaves the old file."""

import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from nbgrad.autograd import Tensor
from nbgrad.train import checkpoint
from nbgrad.train.checkpoint import CheckpointError, load, remove_stale, save

BASE = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
ARRAYS = {
    "contiguous": BASE, "transposed": BASE.T, "fortran": np.asfortranarray(BASE),
    "strided": BASE[:, ::2, 1:], "backwards": BASE[::-1, :, ::-1], "broadcast": np.broadcast_to(
        BASE[0, 0], (3, 4)), "scalar": np.array(2.5), "empty": np.empty((0, 3), np.float32),
    "int64": np.array([-2**63, 2**63 - 1]), "uint8": np.arange(5, dtype=np.uint8),
    "bool": np.array([True, False]), "nan": np.array([np.nan, np.inf, -0.0]),
    "big-endian": np.arange(3, dtype=">f4"),
}


def state():
    rng = np.random.default_rng(0)
    return {
        "model": {"fc.weight": Tensor(rng.normal(size=(5, 3)).astype(np.float32))},
        "optimizer": {"state": {0: {"buf": rng.normal(size=4)}}, "param_groups": [{"lr": 0.1}]},
        "generator": {"state": 2**127 + 1}, "betas": (0.9, 0.999), "none": None,
        "config": {"name": "ü", "nested": [1, [2.5, "x"], {"deep": True}]},
    }


def same(a, b):
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and same(a.data, b.data)
    if isinstance(a, np.ndarray):
        b = np.asarray(b)
        return (a.shape, a.dtype.newbyteorder("=")) == (b.shape, b.dtype) and (
            a.astype(b.dtype).tobytes() == b.tobytes())
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_any_layout_comes_back_bit_for_bit(name, tmp_path):
    save(tmp_path / "c.safetensors", {"x": ARRAYS[name]})
    assert same(ARRAYS[name], load(tmp_path / "c.safetensors")["x"])


def test_a_tree_comes_back_with_its_types(tmp_path):
    save(tmp_path / "c.safetensors", state())
    assert same(state(), load(tmp_path / "c.safetensors"))


def test_names_that_would_collide_are_kept_apart(tmp_path):
    x, y, z = np.zeros(1), np.ones(1), np.full(1, 2.0)
    tricky = {"a.b": x, "a": {"b": y}, "__metadata__": z, "m": {"$array": 3}, "t": {1: x, "1": y}}
    save(tmp_path / "c.safetensors", tricky)
    assert same(tricky, load(tmp_path / "c.safetensors"))


def test_a_value_that_cannot_be_stored_is_named_and_the_old_file_stays(tmp_path):
    path = save(tmp_path / "c.safetensors", {"n": 1})
    with pytest.raises(TypeError, match=r"a\.0 is a set"):
        save(path, {"a": [{1}]})
    assert load(path) == {"n": 1}
    assert os.listdir(tmp_path) == ["c.safetensors"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(broken, tmp_path, monkeypatch):
    path = save(tmp_path / "c.safetensors", {"n": 1})

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space"):
        save(path, {"n": 2})
    monkeypatch.undo()
    assert load(path) == {"n": 1}
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_only_our_own_leftovers_are_removed(tmp_path):
    for name in (".last.safetensors.123.tmp", "other.tmp", ".x.tmp", "last.safetensors"):
        (tmp_path / name).touch()
    remove_stale(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".x.tmp", "last.safetensors", "other.tmp"]


# ----------------------------------------------------------------------------- hostile files

def mutated(blob, rng):
    """One of: bits flipped, cut off, a piece doubled, a piece removed, another header length."""
    data = bytearray(blob)
    kind = rng.randrange(5)
    at = rng.randrange(len(data))
    if kind == 0:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = data[at:at + rng.randrange(1, 40)]
    elif kind == 3:
        del data[at:at + rng.randrange(1, 40)]
    else:
        lengths = [0, 1, 7, len(data), 2**31, 2**63, rng.getrandbits(64)]
        data[:8] = struct.pack("<Q", rng.choice(lengths))
    return bytes(data)


def test_no_mutation_of_a_file_passes_unnoticed(tmp_path):
    blob = save(tmp_path / "good.safetensors", state()).read_bytes()
    path, refused = tmp_path / "bad.safetensors", 0
    for seed in range(1000):
        path.write_bytes(mutated(blob, random.Random(seed)))
        try:
            found = load(path)
        except CheckpointError:
            refused += 1
        else:
            assert same(state(), found), f"seed {seed}: a damaged file was believed"
    assert refused > 950


def written(path, header, body=b""):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def announcing(text, **tensors):
    """A header whose checksum is right: what the damage test cannot reach."""
    arrays = {k: np.zeros(1, np.float32) for k in tensors}
    return {"__metadata__": {"format": checkpoint.FORMAT, "state": text,
                             "crc32": checkpoint._checksum(text, arrays)}, **tensors}


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HOSTILE = {
    "empty": b"", "no header": b"{}", "not JSON": b"[" * 100_000, "a list": b"[1, 2]",
    "other file": {"x": ONE},
    "huge shape": {"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}},
    "negative shape": {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "beyond the end": {"x": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}},
    "unknown dtype": {"x": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]}},
    "missing array": announcing('{"a": {"$array": "nothing"}}', x=ONE),
    "unhashable name": announcing('{"a": {"$array": {}}}', x=ONE),
    "unhashable key": announcing('{"a": {"$dict": [[[1], 2]]}}', x=ONE),
    "odd pairs": announcing('{"a": {"$dict": [1]}}', x=ONE),
    "tuple of nothing": announcing('{"a": {"$tuple": 5}}', x=ONE),
    "deep": announcing("[" * 50_000 + "]" * 50_000, x=ONE),
    "no dictionary": announcing("[1]", x=ONE), "no JSON": announcing("{", x=ONE),
    "long number": announcing("1" * 10_000, x=ONE),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(name, tmp_path):
    path = written(tmp_path / "c.safetensors", HOSTILE[name], b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"c\.safetensors") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_hostile_headers_are_refused_for_their_state_not_their_checksum(tmp_path):
    header = announcing('{"a": {"$array": "x"}}', x=ONE)
    path = written(tmp_path / "c.safetensors", header, b"\0" * 4)
    assert load(path)["a"].tolist() == [0.0]


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "c.safetensors"
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", 2**33 - 8))
        f.truncate(2**33)       # sparse: 8 GB that take no disk
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="header of 8589934584 bytes"):
        load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match="not a file"):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a file"):
        load(tmp_path / "pipe")


SAVING_UNTIL_KILLED = """
import os, random, signal, sys, time
import numpy as np
from nbgrad.train.checkpoint import load, remove_stale, save

path, n = sys.argv[1] + "/last.safetensors", 0
save(path, {"n": 0, "x": np.zeros(50_000)})
for round in range(20):
    child = os.fork()
    if child == 0:
        while True:
            n += 1
            save(path, {"n": n, "x": np.full(50_000, float(n))})
    time.sleep(random.Random(round).uniform(0.0, 0.04))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    remove_stale(sys.argv[1])
    state = load(path)
    assert (state["x"] == state["n"]).all(), state["n"]
    assert state["n"] >= n, (state["n"], n)
    assert os.listdir(sys.argv[1]) == ["last.safetensors"]
    n = state["n"]
assert n > 20, n
"""


def test_kill_9_during_a_save_leaves_a_whole_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "-c", SAVING_UNTIL_KILLED, str(tmp_path)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
