"""The project's one tolerance and its input factories, used by tests and benchmarks.

The error budget compares with a float64 truth: an implementation may err twice as much as plain
PyTorch in the same dtype does, plus the rounding that any summation order may add,

    |out - truth| <= 2 max|eager - truth| + sqrt(K) eps(accumulator) max|truth| + eps(16) max|truth|

where K is the length of the longest reduction, the accumulator is fp32 (fp64 for fp64), and the
last term counts where an input or the output is 16 bits wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmos_fast import dispatch

Tensors = Mapping[str, Tensor | None]


def assert_close_to_truth(
    out: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    reduction: int,
    dtype: torch.dtype | None = None,
    name: str = "out",
) -> None:
    """Raise AssertionError where ``out`` leaves the error budget; all three have one shape.

    ``dtype`` is that of the narrowest input, by default that of ``out``.
    """
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
    dtype = dtype or out.dtype
    if dtype in (torch.bfloat16, torch.float16):
        budget += torch.finfo(dtype).eps * scale
    assert error <= budget, f"{name}: error {error:.3g} is over the budget {budget:.3g}"


def _leaves(tensors: Tensors, dtype: torch.dtype | None) -> dict[str, Tensor | None]:
    """Detached copies with the same strides; floating-point ones in ``dtype`` where it is given."""
    copies: dict[str, Tensor | None] = {}
    for name, tensor in tensors.items():
        if tensor is None:
            copies[name] = None
            continue
        copy = tensor.detach().clone()
        if dtype is not None and copy.is_floating_point():
            copy = copy.to(dtype)
        copies[name] = copy.requires_grad_(tensor.requires_grad)
    return copies


def outputs_and_gradients(
    function: Callable[..., Any], tensors: Tensors, options: Mapping[str, Any], seed: int = 0
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs of ``function(**tensors, **options)``, and gradients of a fixed random combination.

    Gradients are those of the tensors that require them, by name.
    """
    torch.manual_seed(seed)
    result = function(**tensors, **options)
    outputs = list(result) if isinstance(result, tuple) else [result]
    wanted = {n: t for n, t in tensors.items() if t is not None and t.requires_grad}
    if not wanted:
        return outputs, {}
    generator = torch.Generator().manual_seed(seed + 1)
    # one direction per output, drawn whether it is differentiable or not
    directions = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    pairs = [(o, d) for o, d in zip(outputs, directions, strict=True) if o.requires_grad]
    gradients = torch.autograd.grad(
        [o for o, _ in pairs], list(wanted.values()), [d for _, d in pairs], allow_unused=True
    )
    return [o.detach() for o in outputs], dict(zip(wanted, gradients, strict=True))


def assert_within_budget(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    tensors: Tensors,
    options: Mapping[str, Any] | None = None,
    *,
    impl: str,
    reduction: int,
) -> None:
    """Compare ``op(impl=impl)`` with the float64 reference: outputs, and gradients where asked.

    Gradients are checked for the tensors that require them. Dropout draws the same bits in all
    three runs, because each starts from the same seed.

    Args:
        op: one of llmos_fast.ops.
        reference: the same of llmos_fast.reference.
        tensors: arguments that are tensors, by name.
        options: the other arguments, by name.
        impl: implementation under test.
        reduction: length of the longest sum that any result is made of.
    """
    options = options or {}
    floating = [t.dtype for t in tensors.values() if t is not None and t.is_floating_point()]
    dtype = min(floating, key=lambda d: torch.finfo(d).bits)
    truth = outputs_and_gradients(reference, _leaves(tensors, torch.float64), options)
    with native_precision():
        eager = outputs_and_gradients(reference, _leaves(tensors, None), options)
    ours = outputs_and_gradients(op, _leaves(tensors, None), {**options, "impl": impl})
    for index, (out, low, true) in enumerate(zip(ours[0], eager[0], truth[0], strict=True)):
        assert_close_to_truth(
            out, low, true, reduction=reduction, dtype=dtype, name=f"output {index}"
        )
    for name, true_gradient in truth[1].items():
        gradient, low_gradient = ours[1][name], eager[1][name]
        if true_gradient is None:
            assert gradient is None or not gradient.any(), f"gradient of {name}: should be zero"
            continue
        assert gradient is not None, f"gradient of {name} is missing"
        assert low_gradient is not None, f"gradient of {name} is missing in eager"
        assert_close_to_truth(
            gradient,
            low_gradient,
            true_gradient,
            reduction=reduction,
            dtype=dtype,
            name=f"gradient of {name}",
        )


@contextmanager
def native_precision() -> Iterator[None]:
    """Inside, the reference computes in the dtype of its inputs, as eager PyTorch layers do."""
    from llmos_fast.reference import precision

    previous, precision.UPCAST = precision.UPCAST, False
    try:
        yield
    finally:
        precision.UPCAST = previous


@contextmanager
def registered_calls() -> Iterator[dict[str, tuple[Any, tuple[Any, ...]]]]:
    """Inside, every registered op of ours is noted at its first call: name -> (op, arguments)."""
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function.namespace == "llmos_fast":
                calls.setdefault(function.name(), (function, args))
            return function(*args, **(kwargs or {}))

    with Record():  # type: ignore[no-untyped-call]
        yield calls


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
