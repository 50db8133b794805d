"""Fixtures of the op tests: the instruction sets that this CPU has."""

import pytest

from llmos_fast import _C
from llmos_fast.native import product


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "generic"])
def cpu_set(request):
    """Force one instruction set of the CPU kernels."""
    if request.param not in _C.cpu_sets():
        pytest.skip(f"this CPU has no {request.param}")
    _C.force_cpu(request.param)
    yield request.param
    _C.force_cpu("")


@pytest.fixture
def products_by(monkeypatch):
    """A function that says who multiplies more than a few rows: "own", "onednn" or "torch"."""

    def forget() -> None:
        product.asked.cache_clear()
        product.route.cache_clear()

    def choose(name):
        monkeypatch.setenv("LLMOS_FAST_PRODUCT", name)
        forget()

    yield choose
    forget()
