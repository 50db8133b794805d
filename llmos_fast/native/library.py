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

Function = Callable[..., Any]


def is_plain(arguments: tuple[Any, ...]) -> bool:
    """True where every tensor is an ordinary one and nobody traces: raw pointers may be taken."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    for a in arguments:
        kind = type(a)
        if kind is not Tensor and kind is not torch.nn.Parameter and isinstance(a, Tensor):
            return False
    return True


def register(schema: str, cpu: Function, fake: Function) -> Function:
    """Define ``llmos_fast::<schema>`` without gradients; return how to call it.

    Args:
        schema: name, arguments and results, in torch.library's language.
        cpu: the kernel; takes the arguments in the schema's order.
        fake: likewise, but computes shapes, dtypes and strides only.
    """
    op = _define(schema, cpu, fake)

    def call(*arguments: Any) -> Any:
        return cpu(*arguments) if is_plain(arguments) else op(*arguments)

    return call


def differentiable(
    schema: str, cpu: Function, fake: Function, setup_context: Function, backward: Function
) -> Function:
    """As ``register``, with gradients.

    Args:
        schema: as in ``register``.
        cpu: as in ``register``.
        fake: as in ``register``.
        setup_context: ``(ctx, inputs, output)``, saves what the gradients need.
        backward: ``(ctx, *output_gradients)``, returns one gradient per argument.
    """
    op = _define(schema, cpu, fake)
    name = schema.split("(", 1)[0]
    torch.library.register_autograd(
        f"llmos_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = cpu(*arguments)
        setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    eager: Any = type(name, (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        if not is_plain(arguments):
            return op(*arguments)
        if torch.is_grad_enabled():
            return eager.apply(*arguments)
        return cpu(*arguments)

    return call


def _define(schema: str, cpu: Function, fake: Function) -> Function:
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"llmos_fast::{name}", fake, lib=LIBRARY)
    op: Function = getattr(torch.ops.llmos_fast, name).default
    return op
