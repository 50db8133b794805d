"""What tests on a real GPU need around them."""

import os

import pytest
import torch

# cuBLAS, which the references call, is deterministic only with a workspace of its own; read when
# its first product runs
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def living_gpu():
    """A kernel that reads where it must not ends the process's use of the GPU for good.

    Under pytest-xdist the worker then ends, and another one takes up the tests that are left.
    """
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


@pytest.fixture
def captured():
    """``captured(run)``: a CUDA graph of ``run``, and what it returned in it."""

    def capture(run):
        with torch.cuda.stream(torch.cuda.Stream()):
            run()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()
        return graph, result

    return capture
