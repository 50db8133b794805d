"""The one place where an implementation of an op is chosen.

An implementation is a module with two functions that take the op's validated call as keywords:

    unsupported(**call) -> str | None    None, or a sentence that says what it needs and what it got
    forward(**call) -> Tensor | tuple    the result, autograd included

``select`` walks the op's list in order of preference; it ends at the reference, which supports
every valid call. A name forced by ``impl=``, ``use()`` or ``LLMOS_FAST_IMPL`` never falls back.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch

# where an implementation of that name lives, in the order of preference: compiled kernels take the
# tensors of their device, and CPU tensors reach Triton only where its interpreter is forced
FOLDERS = {"native": "native", "triton": "kernels", "reference": "reference"}
_REGISTRY: dict[str, tuple[Implementation, ...]] = {}
_forced: str | None = os.environ.get("LLMOS_FAST_IMPL") or None
_explaining = False
# without it nothing reaches Triton, whose import takes 75 MB
_CUDA = torch.version.cuda is not None


class Implementation(NamedTuple):
    """One way to compute an op; ``module`` is None where ``missing`` says why it cannot be used."""

    name: str
    module: ModuleType | None
    missing: str


class Refusal(NamedTuple):
    """What one implementation answers to a call: ``reason`` is None where it would take it."""

    implementation: str
    reason: str | None


class _Explained(Exception):
    """Carries the answers out of an op that was called only to be explained."""

    def __init__(self, refusals: list[Refusal]):
        self.refusals = refusals


def implementations(op: str, *names: str) -> tuple[Implementation, ...]:
    """Load the implementations of ``op`` in order of preference; the reference is always last."""
    _REGISTRY[op] = tuple(_load(op, name) for name in (*names, "reference"))
    return _REGISTRY[op]


def _load(op: str, name: str) -> Implementation:
    if name == "triton" and not (_CUDA or os.environ.get("TRITON_INTERPRET") == "1"):
        return Implementation(name, None, "needs a torch with CUDA, and this one has none")
    path = f"llmos_fast.{FOLDERS[name]}.{op}"
    try:
        return Implementation(name, importlib.import_module(path), "")
    except ImportError as error:
        if name == "reference":
            raise
        missing = f"cannot be imported ({error})"
        warnings.warn(
            f"llmos_fast: {name} kernels {missing}; calls that need them run slower, without them",
            stacklevel=2,
        )
        return Implementation(name, None, missing)


def select(op: str, impl: str, **call: Any) -> Any:
    """Result of the first implementation that takes the call, or of the one that is forced.

    Raises ValueError, with the reason, where the forced implementation does not take the call.
    """
    if _explaining:
        raise _Explained(_refusals(op, call))
    name = _forced if impl == "auto" and _forced is not None else impl
    candidates = _REGISTRY[op]
    if name == "auto":
        for candidate in candidates:
            module = candidate.module
            if module is not None and module.unsupported(**call) is None:
                return _forward(module, call)
        raise AssertionError(f"{op}: the reference refused a valid call")
    for candidate in candidates:
        if candidate.name == name:
            reason = _refusal(candidate, call)
            if reason is None:
                assert candidate.module is not None
                return _forward(candidate.module, call)
            raise ValueError(f"{op}(impl={name!r}): {name} {reason}")
    known = ", ".join(candidate.name for candidate in candidates)
    raise ValueError(f"{op}(impl={name!r}): no such implementation; this op has: {known}")


def _forward(module: ModuleType, call: dict[str, Any]) -> Any:
    # the op has cast its arguments: autocast must not cast again what is computed on the way
    if not torch._C._is_any_autocast_enabled():
        return module.forward(**call)
    device = next(v.device.type for v in call.values() if isinstance(v, torch.Tensor))
    with torch.autocast(device, enabled=False):
        return module.forward(**call)


def _refusal(candidate: Implementation, call: dict[str, Any]) -> str | None:
    if candidate.module is None:
        return candidate.missing
    reason: str | None = candidate.module.unsupported(**call)
    return reason


def _refusals(op: str, call: dict[str, Any]) -> list[Refusal]:
    return [Refusal(c.name, _refusal(c, call)) for c in _REGISTRY[op]]


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force every op inside the block to run on implementation ``name``, in the whole process."""
    global _forced
    if name not in FOLDERS:
        raise ValueError(f"use: name must be one of {', '.join(FOLDERS)}, got {name!r}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Refusal]:
    """Which implementations would take this call, in order of preference; nothing is computed.

    The first entry whose ``reason`` is None is the one that runs. Bad arguments raise ValueError
    as the call itself would.
    """
    global _explaining
    _explaining = True
    try:
        op(*args, **kwargs)
    except _Explained as answer:
        return answer.refusals
    finally:
        _explaining = False
    raise ValueError(f"explain: op must be one of llmos_fast.ops, got {op!r}")


def registered() -> dict[str, tuple[Implementation, ...]]:
    """Every op that has been loaded, with its implementations."""
    return dict(_REGISTRY)
