"""A function's native calls, recorded once and made again without Python.

A decoder layer of GPT-2's size is about ten native calls of 5 to 100 us each, and Python spends
10 to 25 us on arguments and checks before each of them. What a CUDA graph is to a GPU, this is to
a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from llmos_fast.library import KERNELS

try:
    import llmos_fast._C as _C
except ImportError:
    _C = None

_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


# what kernels make for themselves and only read; torch.tensor ends with detach_
_CONSTANTS = {torch.ops.aten.full.default, torch.ops.aten.detach_.default}


class Captured:
    """What ``capture`` returns; call it as the function.

    Attributes:
        inputs: the tensors that a call's inputs are copied to; a caller that writes into these
            itself calls ``replay()`` instead.
        outputs: what the function returned; every call overwrites these tensors.
    """

    def __init__(self, function: Callable[..., Any], *inputs: Tensor):
        for i, x in enumerate(inputs):
            if not isinstance(x, Tensor) or not x.is_cpu:
                got = x.device if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"capture: input {i} must be a CPU tensor, got {got}")
        if _C is None:
            raise ValueError("capture: the C++ extension must be built, got none")
        self.inputs = tuple(x.detach().clone() for x in inputs)
        self._recording = _C.Recording()
        self._recorder = _Recorder()
        with torch.no_grad(), self._recording, self._recorder:
            self.outputs = function(*self.inputs)

    def __len__(self) -> int:
        """How many native calls were recorded."""
        return len(self._recording)

    def replay(self) -> Any:
        """Make the recorded calls on what ``inputs`` hold now; return ``outputs``."""
        self._recording.replay()
        return self.outputs

    def __call__(self, *inputs: Tensor) -> Any:
        """``replay`` for these inputs, of the same number, shapes and dtypes as the first ones."""
        if len(inputs) != len(self.inputs):
            raise ValueError(f"capture: inputs must be {len(self.inputs)}, got {len(inputs)}")
        for i, (mine, new) in enumerate(zip(self.inputs, inputs, strict=True)):
            if new.shape != mine.shape or new.dtype != mine.dtype:
                rule = f"be {mine.dtype} {tuple(mine.shape)}, as it was captured"
                got = f"{new.dtype} {tuple(new.shape)}"
                raise ValueError(f"capture: input {i} must {rule}, got {got}")
            mine.copy_(new)
        return self.replay()


def capture(function: Callable[..., Any], *inputs: Tensor) -> Captured:
    """Run ``function(*inputs)`` once and record its native calls, to replay them without Python.

        step = llmos_fast.capture(decode_step, x, lengths)
        y = step(x, lengths)

    The function must consist of ops of llmos_fast on their native CPU kernels, of views and of
    empty tensors: whatever else would compute something is refused, because a replay would not
    compute it again. A replay reads and writes the same memory each time: parameters, caches and
    lengths count with the values they have then, Python numbers and shapes with those of the
    capture. There are no gradients.

    Args:
        function: takes the inputs; what it returns is what each replay returns.
        inputs: CPU tensors; the capture keeps copies, into which calls copy theirs.

    Returns:
        A callable like ``function``, whose outputs are overwritten by its next call. It must not
        run in two threads at once.

    Raises:
        ValueError: naming the operation that cannot be captured, or a bad input.
    """
    return Captured(function, *inputs)


class _Recorder(TorchDispatchMode):
    """Lets pass what a replay repeats, and keeps every tensor whose address a kernel has seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: list[Tensor] = []
        self._inside_kernel = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would wrap what follows, which imports its compiler: 1 s and 130 MB
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kernel = KERNELS.get(func)
        if kernel is not None:
            # one kernel may call another
            outer, self._inside_kernel = self._inside_kernel, True
            with self:
                out = kernel(*args, **(kwargs or {}))
            self._inside_kernel = outer
        else:
            out = func(*args, **(kwargs or {}))
            constant = self._inside_kernel and func in _CONSTANTS
            if not (constant or func in _EMPTY or _is_view(func, args, out)):
                rule = "function must consist of native ops, views and empty tensors"
                raise ValueError(f"capture: {rule}, got {func}")
        self._alive += _tensors((args, out))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _is_view(func: Any, args: Any, out: Any) -> bool:
    """Whether ``out`` is ``args`` seen otherwise: nothing was written, nothing copied."""
    aliases = [value.alias_info for value in func._schema.returns]
    if not aliases or any(a is None or a.is_write for a in aliases):
        return False
    # contiguous() and reshape() copy where they cannot alias
    known = {t.untyped_storage().data_ptr() for t in _tensors(args)}
    return all(t.untyped_storage().data_ptr() in known for t in _tensors(out))
