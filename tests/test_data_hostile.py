"""Damaged and hostile dataset files: a typed error or the right data, within bounded memory."""

import gzip
import os
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest

from nbgrad import data
from nbgrad.data import DataError

_ITEM = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def idx(shape, payload=None, *, code=0x08, ndim=None, start=b"\0\0"):
    """An IDX file with any header."""
    if payload is None:
        payload = bytes(range(1, 1 + int(np.prod(shape))))
    ndim = len(shape) if ndim is None else ndim
    return start + bytes([code, ndim]) + struct.pack(f">{len(shape)}i", *shape) + payload


def bomb(head: bytes, zeros: int) -> bytes:
    """A gzip file of head and then `zeros` zero bytes, built without compressing them all."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    out = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    # after a full flush deflate starts on a byte and without history: the block can be repeated
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08" + bytes(7) + out + block * (zeros >> 24)


def peak_of(read):
    """Seconds and the peak of traced memory of a call."""
    tracemalloc.start()
    start = time.perf_counter()
    try:
        read()
    finally:
        seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return seconds, peak


def parse(raw: bytes):
    """IDX, read slowly from its definition; None where it is not a valid file."""
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _ITEM or not 1 <= raw[3] <= 8:
        return None
    head = 4 + 4 * raw[3]
    if len(raw) < head:
        return None
    shape = [int.from_bytes(raw[i : i + 4], "big", signed=True) for i in range(4, head, 4)]
    dtype = np.dtype(_ITEM[raw[2]])
    count = 1
    for n in shape:
        count *= n
    if min(shape) < 0 or count * dtype.itemsize != len(raw) - head:
        return None
    return np.frombuffer(raw, dtype, offset=head).reshape(shape)


def mutated(raw: bytes, rng) -> bytes:
    """A file with one to three bytes changed, a piece cut, doubled or dropped, or bytes added."""
    out = bytearray(raw)
    kind = rng.integers(5)
    at, other = sorted(int(i) for i in rng.integers(0, len(raw) + 1, 2))
    if kind == 0:
        for i in rng.integers(0, len(raw), rng.integers(1, 4)):
            out[i] = rng.integers(256)
    elif kind == 1:
        del out[at:]
    elif kind == 2:
        out[at:at] = raw[at:other]
    elif kind == 3:
        del out[at:other]
    else:
        out += rng.bytes(int(rng.integers(1, 20)))
    return bytes(out)


def test_600_mutations_of_an_idx_file_are_refused_or_read_right(tmp_path):
    rng = np.random.default_rng(0)
    raw = idx((3, 2, 2))
    refused = 0
    for _ in range(600):
        # half of them in the header, which is most of such a small file's meaning
        damaged = mutated(raw, rng) if rng.integers(2) else mutated(raw[:16], rng) + raw[16:]
        (tmp_path / "x").write_bytes(damaged)
        expected = parse(damaged)
        try:
            got = data.read_idx(tmp_path / "x")
        except DataError:
            assert expected is None
            refused += 1
        else:
            assert np.array_equal(got, expected, equal_nan=True)
            assert got.shape == expected.shape
    assert 300 < refused < 600


def test_600_mutations_of_a_gzip_file_are_refused_or_read_right(tmp_path):
    rng = np.random.default_rng(1)
    raw = idx((3, 2, 2))
    packed = gzip.compress(raw)
    refused = 0
    for _ in range(600):
        (tmp_path / "x").write_bytes(damaged := mutated(packed, rng))
        try:
            got = data.read_idx(tmp_path / "x")
        except DataError:
            refused += 1
        else:
            # the checksum covers the content; what may change is the time stamp and such
            assert np.array_equal(got, parse(raw)), damaged
    assert 300 < refused < 600


def test_300_mutations_of_a_cifar_file_are_refused_or_read_right(tmp_path):
    rng = np.random.default_rng(2)
    record = rng.integers(0, 256, 3073, dtype=np.uint8)
    record[0] = 3
    raw = record.tobytes() * 2
    refused = 0
    for _ in range(300):
        damaged = mutated(raw, rng)
        if rng.integers(2):
            damaged = bytes([rng.integers(256)]) + damaged[1:]
        (tmp_path / "test_batch.bin").write_bytes(damaged)
        valid = len(damaged) > 0 and len(damaged) % 3073 == 0 and max(damaged[::3073]) < 10
        try:
            images, labels = data.cifar10(tmp_path, "test").tensors
        except DataError:
            assert not valid
            refused += 1
        else:
            assert valid
            rows = np.frombuffer(damaged, np.uint8).reshape(-1, 3073)
            assert np.array_equal(labels.numpy(), rows[:, 0])
            assert np.array_equal(
                images.numpy().reshape(-1, 3072), (rows[:, 1:] / 255.0).astype(np.float32)
            )
    assert 150 < refused < 300


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x08", "not an IDX file"),
        (idx((2, 2), start=b"\0\1"), "not an IDX file"),
        (idx((2, 2), code=0x0A), "unknown IDX dtype code 0x0a"),
        (idx((), ndim=0), "0 dimensions"),
        (idx((1,) * 9), "9 dimensions"),
        (idx((2, 2), ndim=255), "255 dimensions"),
        (idx((2,), b"", ndim=2), "header ends before its 2 dimensions"),
        (idx((-1, 4), b"1234"), r"negative dimension in shape \(-1, 4\)"),
        (idx((-2, -2), b"1234"), "negative dimension"),
        (idx((2, 2), b"123"), "truncated"),
        (idx((2, 2), b"12345"), "goes on after the 4 bytes"),
        (idx((0,), b"1"), "goes on after the 0 bytes"),
        (idx((1 << 16, 1 << 16, 1 << 16, 1 << 16), b""), f"needs {1 << 64} bytes"),  # 0 mod 2⁶⁴
        (idx((2**31 - 1,) * 8, b""), "the limit is"),
        (idx((0, 2**31 - 1, 2**31 - 1, 2**31 - 1), b""), "the limit is"),
        (idx((1 << 27,), b"1"), "truncated"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_headers_and_lengths_are_refused_before_allocation(tmp_path, raw, problem, packed):
    (tmp_path / "x").write_bytes(gzip.compress(raw) if packed else raw)

    def read():
        with pytest.raises(DataError, match=problem) as caught:
            data.read_idx(tmp_path / "x")
        assert str(tmp_path / "x") in str(caught.value)

    assert peak_of(read)[1] < 1 << 22


@pytest.mark.parametrize(
    "head",
    [
        b"",  # not even a header
        idx((10, 28, 28), bytes(7840)),  # the right data, then a gigabyte
        idx((1 << 30,), b""),  # a header that asks for it
        idx((1 << 25,), b""),  # 32 MB within the limit, then the rest
    ],
)
def test_a_gzip_bomb_of_a_gigabyte_is_refused_at_once(tmp_path, head):
    (tmp_path / "x.gz").write_bytes(bomb(head, 1 << 30))

    def read():
        with pytest.raises(DataError):
            data.read_idx(tmp_path / "x.gz")

    seconds, peak = peak_of(read)
    assert peak < 64 << 20
    assert seconds < 5


def test_the_limit_on_bytes_is_the_callers_to_raise(tmp_path):
    (tmp_path / "x").write_bytes(idx((4, 5)))
    assert data.read_idx(tmp_path / "x", max_bytes=32).sum() == 210
    with pytest.raises(DataError, match="more than the limit of 31"):
        data.read_idx(tmp_path / "x", max_bytes=31)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        data.read_idx(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        data.read_idx(tmp_path)


@pytest.mark.parametrize(
    ("images", "labels", "problem"),
    [
        (idx((2, 28, 28), bytes(1568)), idx((2,), b"\3\12"), "label 10 at 1 is not in 0..9"),
        (idx((2, 28, 28), bytes(1568)), idx((3,), bytes(3)), "2 images, but 3 labels"),
        (idx((2, 14, 56), bytes(1568)), idx((2,), bytes(2)), r"images must be uint8 \(N, 28, 28\)"),
        (idx((2, 784), bytes(1568)), idx((2,), bytes(2)), "images must be"),
        (idx((2, 28, 28), bytes(1568), code=9), idx((2,), bytes(2)), "images must be uint8"),
        (idx((2, 28, 28), bytes(1568)), idx((2,), bytes(2), code=9), r"labels must be uint8"),
        (idx((2, 28, 28), bytes(1568)), idx((2, 1), bytes(2)), "labels must be"),
        (idx((0, 28, 28), b""), idx((0,), b""), "labels must be"),
        (idx((2, 28, 28), bytes(1567)), idx((2,), bytes(2)), "truncated"),
    ],
)
def test_mnist_pairs_that_do_not_fit_are_refused(tmp_path, images, labels, problem):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    with pytest.raises(DataError, match=problem):
        data.mnist(tmp_path)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "0 bytes are not a whole number"),
        (bytes(3072), "3072 bytes are not a whole number"),
        (bytes(3073 * 10_001), "more than the limit of 30730000"),
        (bytes(3073) + b"\12" + bytes(3072), "label 10 at 1 is not in 0..9"),
        (gzip.compress(bytes(3073), mtime=0), "not a whole number"),
    ],
)
def test_bad_cifar_files_are_refused(tmp_path, raw, problem):
    (tmp_path / "test_batch.bin").write_bytes(raw)
    with pytest.raises(DataError, match=problem):
        data.cifar10(tmp_path, "test")
