"""Whether this GPU computes what a launch says, asked before its first use on a machine.

ptxas before 13.3 may reuse the registers of a product's left operand while Hopper's tensor cores
still read them: one tile's probabilities then multiply another tile's values, or do so at times.
Every launch therefore has to give exact results, again and again, before it is used; verdicts.py
keeps what was found.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import launch as launches
from . import ptxas
from .attention_backward import backward
from .attention_exact import backward_problem, forward_problem
from .attention_forward import forward
from .launch import Pinned, Variant
from .runtime import INTERPRETED, architecture
from .verdicts import load, store

# results of each kernel that multiplies probabilities, or their gradients, from registers
KERNELS = {
    "attention_forward": ("out", "weight"),
    "attention_backward_key": ("d_key", "d_value"),
    "attention_backward_query": ("d_query",),
}
# batch, seq: more programs than the GPU runs at a time, and few; tiles that end in the middle
SIZES = ((6, 1040), (1, 528))
ROUNDS, SECONDS = 100, 0.1

_lock = threading.Lock()
_settled: set[tuple[torch.device, Variant]] = set()
_admitted: set[tuple[object, ...]] = set()
_named: set[str] = set()


def passes(variant: Variant, device: torch.device) -> bool:
    """Whether the launch gives the exact results, every time; 0.1 s once it is compiled."""
    trials = [_trial(variant, batch, seq, device) for batch, seq in SIZES]
    deadline = math.inf
    for _ in range(ROUNDS):
        # looked at once a round: launches follow one another closely
        if torch.stack([wrong() for wrong in trials]).any():
            return False
        # the first round compiles
        deadline = min(deadline, time.monotonic() + SECONDS)
        if time.monotonic() > deadline:
            break
    return True


def _trial(variant: Variant, batch: int, seq: int, device: torch.device) -> Callable[[], Tensor]:
    """A function that launches the kernel; it returns whether any result is wrong."""
    is_forward = variant.kernel == "attention_forward"
    make = forward_problem if is_forward else backward_problem
    problem = make(seq, variant.head_dim, variant.hides)

    def on_device(x: Tensor) -> Tensor:
        # a batch of one; numbers of a row are fp32
        return x.to(device, torch.float32 if x.dim() == 2 else variant.dtype)[None]

    expected = {name: on_device(problem.results[name]) for name in KERNELS[variant.kernel]}
    given = {n: on_device(x).repeat_interleave(batch, 0) for n, x in problem.inputs.items()}
    a = Pinned(
        given.pop("query"),
        given.pop("key"),
        given.pop("value"),
        mask=None,
        bias=None,
        key_lengths=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=0,
        max_seqlen_k=0,
        alibi_slopes=None,
        sinks=None,
        causal="top_left" if variant.hides else "",
        window_left=-1,
        window_right=-1,
        softcap=0.0,
        dropout_p=0.0,
        seed=None,
        scale=problem.scale,
    )
    # both backward kernels always run: the other one as it will be tested next
    first = {k: launches.candidates(k, device, variant.dtype, variant.head_dim)[0] for k in KERNELS}
    a.launches = first | {variant.kernel: variant.launch}

    def wrong() -> Tensor:
        if is_forward:
            out, lse = forward(a)
            found = {"out": out, "weight": lse.exp().round()}
        else:
            gradients = backward(a, **given, d_lse=None, need_bias=False, need_sinks=False)
            found = dict(zip(("d_query", "d_key", "d_value"), gradients, strict=False))
        # NaN differs from everything
        return torch.stack([(found[n] != x).any() for n, x in expected.items()]).any()

    return wrong


def run(device: torch.device) -> list[Variant]:
    """Test everything that the tables list for ``device`` and 16 bits; return what failed."""
    listed = (
        Variant(kernel, launch, head_dim, dtype, hides)
        for kernel in KERNELS
        for head_dim, entry in launches.TABLE[kernel][architecture(device)][2].items()
        for launch in dict.fromkeys(entry)
        for dtype in (torch.bfloat16, torch.float16)
        for hides in (False, True)
    )
    return [variant for variant in listed if not passes(variant, device)]


def applies(device: torch.device, dtype: torch.dtype) -> bool:
    """Only Hopper multiplies so, and this test is made of 16-bit numbers."""
    return dtype.itemsize == 2 and _is_hopper(device)


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    if INTERPRETED or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def ensure(variant: Variant, device: torch.device) -> None:
    """Strike ``variant`` off where it is wrong; it is tested where no verdict is kept.

    While a CUDA graph is captured, or tensors are fake, only a verdict that is kept counts.
    """
    if variant.kernel not in KERNELS or not applies(device, variant.dtype):
        return
    if (device, variant) in _settled:
        return
    with _lock:
        if (device, variant) in _settled:
            return
        verdicts = load(device)
        if name(variant) not in verdicts:
            if is_in_torch_dispatch_mode() or torch.cuda.is_current_stream_capturing():
                return
            try:
                verdict = passes(variant, device)
            except torch.OutOfMemoryError:
                return  # asked again at the next call
            verdicts = load(device) | {name(variant): verdict}
            store(device, verdicts)
        if not verdicts[name(variant)]:
            launches.struck_off.add(variant)
            _admitted.clear()
        _settled.add((device, variant))
        wrong = [n for n, passed in verdicts.items() if not passed and n not in _named]
        _named.update(wrong)
    if wrong:
        warnings.warn(
            f"llmos_fast: as ptxas {ptxas.version()} assembles it, this is wrong on the "
            f"{torch.cuda.get_device_name(device)} and is not used: {', '.join(wrong)}; "
            f"{ptxas.REMEDY}",
            stacklevel=2,
        )


def refusal(query: Tensor, key: Tensor, value: Tensor, hides: bool) -> str | None:
    """Why no call of this kind can be taken; None where a launch is left for each kernel.

    ``hides``: whether keys are hidden by their position. torch.compile asks while it traces.
    """
    if query.dtype.itemsize != 2:
        return None
    # plain numbers also where torch.compile takes sizes as symbols
    head_dim = 64
    while head_dim < max(query.shape[-1], value.shape[-1]):
        head_dim *= 2
    hidden = False
    if hides:
        hidden = True
    wanted = query.requires_grad or key.requires_grad or value.requires_grad
    kernels = tuple(KERNELS) if torch.is_grad_enabled() and wanted else ("attention_forward",)
    kernels = tuple(kernel for kernel in kernels if kernel not in launches.forced_launches)
    reason: str | None = _refusal(query.device, query.dtype, head_dim, hidden, kernels)
    return reason


def _refusal(
    device: torch.device, dtype: torch.dtype, head_dim: int, hides: bool, kernels: tuple[str, ...]
) -> str | None:
    kind = (device, dtype, head_dim, hides, kernels)
    if kind in _admitted or not applies(device, dtype):
        return None
    for kernel in kernels:
        listed = launches.candidates(kernel, device, dtype, head_dim)
        variants = (Variant(kernel, launch, head_dim, dtype, hides) for launch in listed)
        # the others do not take every call
        general = (v for v in variants if not v.launch.light)
        if not any(launches.usable(variant, device) for variant in general):
            return (
                f"needs a launch of {kernel} that passes the self-test, which all fail as "
                f"ptxas {ptxas.version()} assembles them: {ptxas.REMEDY}"
            )
    _admitted.add(kind)
    return None


# torch.compiler.assume_constant_result (what is traced above are constants, not tensors) without
# its import of the compiler, which takes 0.9 s and 75 MB
_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def name(variant: Variant) -> str:
    """As it is kept and shown."""
    launch = ", ".join(f"{k}={v}" for k, v in asdict(variant.launch).items())
    hides = ", keys hidden" if variant.hides else ""
    return f"{variant.kernel}({launch}; head_dim {variant.head_dim}, {variant.dtype}{hides})"
