"""Registration of kernels with torch.library, and the shorter way that eager calls take.

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

# the CPU kernel of each registered op, which takes the op's arguments
KERNELS: dict[Any, Function] = {}


# what is_plain need not look at more closely; one set operation instead of a loop saves 2 us
_ORDINARY = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str}


def is_plain(arguments: tuple[Any, ...]) -> bool:
    """True where every tensor is an ordinary one and nobody traces: raw pointers may be taken."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    others = set(map(type, arguments)) - _ORDINARY
    return not (others and any(issubclass(kind, Tensor) for kind in others))


def refusal_of_transforms() -> str | None:
    """Why a kernel cannot take part in what surrounds the call; None where it can."""
    if not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "needs tensors outside of torch.func transforms"
        if torch._C._get_tracing_state() is not None:
            return "needs tensors outside of torch.jit.trace"
    return None


def register(
    schema: str, kernel: Function, fake: Function, devices: tuple[str, ...] = ("CPU",)
) -> Function:
    """Define ``llmos_fast::<schema>`` without gradients; return how to call it.

    Args:
        schema: name, arguments and results, in torch.library's language.
        kernel: takes the arguments in the schema's order.
        fake: likewise, but computes shapes, dtypes and strides only.
        devices: torch's dispatch keys of the devices that the kernel runs on.
    """
    op = _define(schema, kernel, fake, devices)

    def call(*arguments: Any) -> Any:
        return kernel(*arguments) if is_plain(arguments) else op(*arguments)

    return call


def differentiable(
    schema: str,
    kernel: Function,
    fake: Function,
    setup_context: Function,
    backward: Function,
    devices: tuple[str, ...] = ("CPU",),
) -> Function:
    """As ``register``, with gradients.

    Args:
        schema: as in ``register``.
        kernel: as in ``register``.
        fake: as in ``register``.
        setup_context: ``(ctx, inputs, output)``, saves what the gradients need.
        backward: ``(ctx, *output_gradients)``, returns one gradient per argument. The gradient of
            an output that nobody used is None; they are never all None.
        devices: as in ``register``.
    """
    op = _define(schema, kernel, fake, devices)
    name = schema.split("(", 1)[0]

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # zeros as large as every output that has no gradient
        setup_context(ctx, inputs, output)

    def gradients(ctx: Any, *d_outputs: Tensor | None) -> Any:
        if all(d_output is None for d_output in d_outputs):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *d_outputs)

    torch.library.register_autograd(
        f"llmos_fast::{name}", gradients, setup_context=set_up, lib=LIBRARY
    )

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = kernel(*arguments)
        set_up(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    eager = type(name, (torch.autograd.Function,), members)
    # Function.apply looks, for 5 us, for tensors of torch.func, which refusal_of_transforms refused
    apply: Any = super(torch.autograd.Function, eager).apply  # type: ignore[misc]

    def call(*arguments: Any) -> Any:
        if not is_plain(arguments):
            return op(*arguments)
        if torch.is_grad_enabled():
            return apply(*arguments)
        return kernel(*arguments)

    return call


def second_order(
    definition: Any,
    tensors: dict[str, Tensor | None],
    rest: dict[str, Any],
    gradients: tuple[Any, ...],
    create_graph: bool = True,
) -> dict[str, Tensor | None]:
    """Gradients that can be differentiated again, computed through the op's definition.

    Args:
        definition: the reference module of the op.
        tensors: differentiable arguments by name, as they were saved.
        rest: the other arguments of ``definition.forward``.
        gradients: of its outputs, None where an output was not used.
        create_graph: False for gradients that need not be differentiated again.
    """
    # views tell arguments apart that are one tensor, or were computed from one another
    tensors = {name: None if t is None else t.view_as(t) for name, t in tensors.items()}
    outputs = definition.forward(**tensors, **rest)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [
        (o, g)
        for o, g in zip(outputs, gradients, strict=False)
        if g is not None and o.requires_grad
    ]
    if not pairs:
        return dict.fromkeys(tensors)
    wanted = {n: t for n, t in tensors.items() if t is not None and t.requires_grad}
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        list(wanted.values()),
        [g for _, g in pairs],
        create_graph=create_graph,
        allow_unused=True,
    )
    return {**dict.fromkeys(tensors), **dict(zip(wanted, found, strict=True))}


def _define(schema: str, kernel: Function, fake: Function, devices: tuple[str, ...]) -> Function:
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in devices:
        LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"llmos_fast::{name}", fake, lib=LIBRARY)
    op: Function = getattr(torch.ops.llmos_fast, name).default
    if "CPU" in devices:
        KERNELS[op] = kernel
    return op
