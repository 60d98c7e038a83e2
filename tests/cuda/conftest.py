"""CUDA kernels in the simulator. Its switch is the process's: tests/test_cuda.py starts one."""

import pytest
from numba import config

collect_ignore_glob = [] if config.ENABLE_CUDASIM and config.DISABLE_JIT else ["test_*.py"]


@pytest.fixture(params=[1, -1], ids=["forward", "backward"])
def either_order(request, monkeypatch):
    """Threads run from the first to the last, and from the last to the first."""
    from nbgrad.kernels.cuda import simulator

    monkeypatch.setattr(simulator, "order", request.param)
