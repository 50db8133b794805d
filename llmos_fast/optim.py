"""AdamW in one pass over memory, and clipping that writes nothing.

optimizer = llmos_fast.optim.AdamW(model.parameters(), lr=1e-3)
optimizer.step(max_norm=1.0)
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AdamW"]

try:
    _native: Any = importlib.import_module("llmos_fast.native.adamw")
except ImportError:
    _native = None

# what only torch's own step knows, or what asks for one of torch's own
_OPTIONS = ("amsgrad", "maximize", "capturable", "differentiable", "foreach", "fused")
# torch wraps the step of a class in its hooks when it makes the first instance: ours would run them
# twice
_torch_step = inspect.unwrap(
    torch.optim.AdamW.step, stop=lambda function: not getattr(function, "hooked", False)
)


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW``: its arguments, its results to rounding, its state in either direction.

    On a CPU a step reads and writes every number once, for all parameters together, and the
    results do not depend on the number of threads. Arithmetic is fp32, also of bf16 parameters.
    Where ``refusal()`` names a reason, steps are torch's own.

    Attributes:
        grad_norm: Float[], of all gradients before they were clipped, by the last step that was
            given ``max_norm``; None before.
    """

    grad_norm: Tensor | None = None

    def refusal(self) -> str | None:
        """Why a step with the present parameters and gradients is torch's own; None where not."""
        if _native is None:
            return "needs the C++ extension, which is not built"
        for group in self.param_groups:
            for option in _OPTIONS:
                if group[option]:
                    return f"needs {option}=False, got {group[option]}"
        found: list[tuple[Tensor, ...]] = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state.get(p, {})
                    moments = (state["exp_avg"], state["exp_avg_sq"]) if state else ()
                    found.append((p, p.grad, *moments))
        reason: str | None = _native.unsupported(found)
        return reason

    def step(
        self, closure: Callable[[], Any] | None = None, *, max_norm: float | None = None
    ) -> Any:
        """Update all parameters that have a gradient; return what ``closure`` returns.

        Args:
            closure: computes the loss and its gradients again.
            max_norm: clip first, as ``nn.utils.clip_grad_norm_`` over all parameters would.
                Kernels read the gradients times the factor, so ``p.grad`` keeps its values;
                before torch's own step it is scaled in place.

        Raises:
            ValueError: where max_norm is not above 0.
        """
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"AdamW.step: max_norm must be above 0, got {max_norm}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.refusal() is None:
            self._native_step(max_norm)
            return loss
        if max_norm is not None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            self.grad_norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        _torch_step(self)
        return loss

    @torch.no_grad()
    def _native_step(self, max_norm: float | None) -> None:
        found: list[tuple[list[Tensor], ...]] = []
        for group in self.param_groups:
            found.append(([], [], [], [], [], []))
            self._init_group(group, *found[-1])  # type: ignore[no-untyped-call]
        factor = 1.0
        if max_norm is not None:
            norm = _native.gradient_norm([g for _, gradients, *_ in found for g in gradients])
            self.grad_norm = torch.tensor(norm)
            # a norm that is not a number stays one
            factor = 1.0 if norm + 1e-6 <= max_norm else max_norm / (norm + 1e-6)
        for group, (parameters, gradients, exp_avgs, exp_avg_sqs, _, steps) in zip(
            self.param_groups, found, strict=True
        ):
            _native.step(
                parameters,
                gradients,
                exp_avgs,
                exp_avg_sqs,
                steps,
                gradient_factor=factor,
                lr=float(group["lr"]),
                betas=(float(group["betas"][0]), float(group["betas"][1])),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
