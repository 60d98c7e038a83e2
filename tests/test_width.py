"""The random tests of the kernels once more, in float32 (compiling is what they cost), with the
vectors of a CPU that has no AVX-512."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nbgrad.kernels import cpu
from nbgrad.kernels.cpu import simd

NARROW = """
import sys
from llvmlite import binding

features = binding.get_host_cpu_features()
for name in features:
    features[name] = features[name] and not name.startswith(("avx512", "avx10"))
binding.get_host_cpu_features = lambda: features

import pytest
from nbgrad.kernels.cpu import simd

assert simd.VECTOR == 32
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.skipif(simd.VECTOR == 32, reason="this CPU's vectors are narrow")
@pytest.mark.skipif(cpu.jit.config.DISABLE_JIT, reason="about compiled code")
@pytest.mark.slow
def test_narrower_vectors_pass_the_random_tests():
    """Numba's cache tells CPUs apart by their features: both codes lie in one folder."""
    tests = Path(__file__).with_name("test_kernels_random.py")
    out = subprocess.run([sys.executable, "-c", NARROW, str(tests)], capture_output=True, text=True,
                         timeout=1200, cwd=tests.parent.parent,
                         env={**os.environ, "NBGRAD_EXAMPLES": "12", "NBGRAD_DTYPES": "float32"})
    assert out.returncode == 0, out.stdout + out.stderr
    assert " passed" in out.stdout
