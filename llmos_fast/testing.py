"""The project's one tolerance and its input factories, used by tests and benchmarks.

The error budget compares with a float64 truth: an implementation may err twice as much as plain
PyTorch in the same dtype does, plus the rounding that any summation order may add,

    |out - truth| <= 2 max|eager - truth| + sqrt(K) eps(accumulator) max|truth| + eps(output) max|truth|

where K is the length of the longest reduction, the accumulator is fp32 (fp64 for fp64), and the
last term counts only for 16-bit outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llmos_fast import dispatch

Tensors = Sequence[Tensor | None]


def assert_close_to_truth(
    out: Tensor, eager: Tensor, truth: Tensor, *, reduction: int, name: str = "out"
) -> None:
    """Raise AssertionError where ``out`` leaves the error budget; all three have one shape."""
    assert out.shape == truth.shape, f"{name}: shape {tuple(out.shape)}, not {tuple(truth.shape)}"
    if out.numel() == 0:
        return
    bad = ~torch.isfinite(out) & torch.isfinite(truth)
    assert not bad.any(), f"{name}: {int(bad.sum())} of {out.numel()} values are not finite"
    same_infinity = torch.isinf(truth) & (out.double() == truth)
    error = (out.double() - truth).abs().masked_fill(same_infinity, 0.0).max().item()
    eager_error = (eager.double() - truth).abs().masked_fill(torch.isinf(truth), 0.0).max().item()
    scale = truth.abs().masked_fill(torch.isinf(truth), 0.0).max().item()
    accumulator = torch.float64 if out.dtype == torch.float64 else torch.float32
    budget = 2 * eager_error + reduction**0.5 * torch.finfo(accumulator).eps * scale
    if out.dtype in (torch.bfloat16, torch.float16):
        budget += torch.finfo(out.dtype).eps * scale
    assert error <= budget, f"{name}: error {error:.3g} is over the budget {budget:.3g}"


def _leaves(inputs: Tensors, dtype: torch.dtype | None) -> list[Tensor | None]:
    """Detached copies; floating-point ones in ``dtype`` and with gradients switched on as given."""
    copies: list[Tensor | None] = []
    for tensor in inputs:
        if tensor is None:
            copies.append(None)
            continue
        copy = tensor.detach()
        if dtype is not None and copy.is_floating_point():
            copy = copy.to(dtype)
        # clone() keeps strides, so an op sees the layout that the test chose
        copies.append(copy.clone().requires_grad_(tensor.requires_grad))
    return copies


def outputs_and_gradients(
    function: Callable[..., Any], inputs: Tensors, kwargs: dict[str, Any], seed: int = 0
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs of ``function(*inputs, **kwargs)`` and gradients of a fixed random combination."""
    torch.manual_seed(seed)
    result = function(*inputs, **kwargs)
    outputs = [o for o in (result if isinstance(result, tuple) else (result,)) if o is not None]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not wanted:
        return outputs, []
    generator = torch.Generator().manual_seed(seed + 1)
    differentiable = [o for o in outputs if o.requires_grad]
    directions = [
        torch.randn(o.shape, generator=generator).to(o.dtype).to(o.device) for o in differentiable
    ]
    gradients = torch.autograd.grad(differentiable, wanted, directions, allow_unused=True)
    return [o.detach() for o in outputs], list(gradients)


def assert_within_budget(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Tensors,
    kwargs: dict[str, Any] | None = None,
    *,
    impl: str,
    reduction: int,
) -> None:
    """Compare ``op(impl=impl)`` with the float64 reference: outputs, and gradients where asked.

    Gradients are checked for the inputs that require them. Dropout draws the same bits in all
    three runs, because each starts from the same seed.
    """
    kwargs = kwargs or {}
    truth = outputs_and_gradients(reference, _leaves(inputs, torch.float64), kwargs)
    with native_precision():
        eager = outputs_and_gradients(reference, _leaves(inputs, None), kwargs)
    ours = outputs_and_gradients(op, _leaves(inputs, None), {**kwargs, "impl": impl})
    for index, (out, low, true) in enumerate(zip(ours[0], eager[0], truth[0], strict=True)):
        assert_close_to_truth(out, low, true, reduction=reduction, name=f"output {index}")
    for index, (out, low, true) in enumerate(zip(ours[1], eager[1], truth[1], strict=True)):
        if true is None:
            assert out is None or not out.any(), f"gradient {index}: should be absent or zero"
        else:
            assert out is not None, f"gradient {index} is missing"
            assert low is not None
            assert_close_to_truth(out, low, true, reduction=reduction, name=f"gradient {index}")


@contextmanager
def native_precision() -> Iterator[None]:
    """Inside, the reference computes in the dtype of its inputs, as eager PyTorch layers do."""
    from llmos_fast.reference import precision

    previous, precision.UPCAST = precision.UPCAST, False
    try:
        yield
    finally:
        precision.UPCAST = previous


def implementations_of(op: str) -> list[str]:
    """Names of the implementations of ``op`` that can be imported here."""
    return [i.name for i in dispatch.registered()[op] if i.module is not None]


def random(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    scale: float = 1.0,
    seed: int | None = None,
) -> Tensor:
    """Normal values drawn in fp32 from ``seed`` (or from the global generator), then rounded."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator) * scale
    return values.to(dtype).requires_grad_(requires_grad)
