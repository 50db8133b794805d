"""Registration of native kernels with torch.library, and the shorter way that eager calls take.

A Python custom op costs 2-6 us per call. Plain eager tensors need none of what it gives, so they
go straight to the function; torch.compile, export, fake tensors and tensor subclasses take the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

LIBRARY = torch.library.Library("llmos_fast", "DEF")


def is_plain(*arguments: Any) -> bool:
    """True where every tensor is an ordinary one and nobody traces: raw pointers may be taken."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    return all(
        type(a) is Tensor or type(a) is torch.nn.Parameter or not isinstance(a, Tensor)
        for a in arguments
    )


def register(
    schema: str, cpu: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define ``llmos_fast::<schema>`` with its CPU kernel and its fake; return how to call it.

    The callable takes positional arguments in the schema's order.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"llmos_fast::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.llmos_fast, name).default

    def call(*arguments: Any) -> Any:
        return cpu(*arguments) if is_plain(*arguments) else op(*arguments)

    return call


def differentiable(
    schema: str,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """As ``register``, with gradients: ``backward(ctx, *output_gradients)``, one per argument."""
    name = schema.split("(", 1)[0]
    call = register(schema, cpu, fake)
    torch.library.register_autograd(
        f"llmos_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )
    op = getattr(torch.ops.llmos_fast, name).default

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = cpu(*arguments)
            setup_context(ctx, arguments, output)
            return output

    Eager.backward = staticmethod(backward)  # type: ignore[method-assign,assignment]
    Eager.__name__ = name

    def call_with_gradients(*arguments: Any) -> Any:
        if not is_plain(*arguments):
            return op(*arguments)
        if torch.is_grad_enabled():
            return Eager.apply(*arguments)
        return cpu(*arguments)

    del call
    return call_with_gradients
