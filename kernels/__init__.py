"""Triton kernels, importable only as ``llmos_fast.kernels``."""

if __name__ == "kernels":
    # A package of that name exists on PyPI: a bare import would hide it, or be hidden by it.
    raise ImportError("import llmos_fast.kernels: the folder 'kernels' is not a top-level module")

from .ptxas import prefer_newer

prefer_newer()
