"""The calls of attention that the compile gate makes for every launch of its tables."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .attention_arguments import Arguments
from .attention_backward import backward
from .attention_decode import LARGEST_HEAD_DIM, decode
from .attention_forward import empty_outputs, forward
from .attention_weights import recompute
from .launch import TABLE, Launch, forced
from .offline import Compiled, Job, meta

LIGHT_CASES = ("causal", "full", "packed")
HEAVY_CASES = (*LIGHT_CASES, "dropout", "scores", "mask")
BIAS_CASES = ("scores", "bias dropout")


def example(case: str, head_dim: int, dtype: torch.dtype, aligned: bool) -> Arguments:
    """A call of attention on meta tensors; one that is not aligned cannot be loaded by TMA."""
    batch, heads_q, heads_kv, seq = 2, 16, 4, 4096
    head_dim, seq = (head_dim, seq) if aligned else (head_dim - 3, seq - 5)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return meta(*shape, dtype=dtype)

    cases: dict[str, dict[str, Any]] = {
        "causal": {"causal": "top_left"},
        "full": {},
        "packed": {"causal": "bottom_right", "window_left": 1000, "sinks": empty(heads_q)},
        "dropout": {"causal": "top_left", "dropout_p": 0.1},
        "scores": {"causal": "top_left", "softcap": 30.0},
        "mask": {},
        "bias dropout": {"dropout_p": 0.1},
    }
    tensors: dict[str, Any] = dict.fromkeys(Arguments._fields)
    query = empty(batch, heads_q, seq, head_dim)
    key = empty(batch, heads_kv, seq, head_dim)
    if case == "packed":
        query, key = (t.transpose(1, 2).reshape(batch * seq, -1, head_dim) for t in (query, key))
        cu = empty(9, dtype=torch.int32)
        tensors |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    if "dropout" in case:
        tensors["seed"] = empty(dtype=torch.int64)
    if case == "scores":
        tensors["alibi_slopes"] = empty(heads_q, dtype=torch.float32)
    if case in ("scores", "bias dropout"):
        tensors["bias"] = empty(1, heads_q, seq, seq)
    if case == "mask":
        tensors["mask"] = empty(batch, 1, seq, seq, dtype=torch.bool)
    defaults = {
        "max_seqlen_q": seq, "max_seqlen_k": seq, "causal": "", "window_left": -1,
        "window_right": -1, "softcap": 0.0, "dropout_p": 0.0, "scale": 0.1,
    }  # fmt: skip
    given = {"query": query, "key": key, "value": key}
    return Arguments(**(tensors | given | defaults | cases[case]))


def jobs(arch: int) -> Iterator[Job]:
    """Every launch of the tables, decoding, and the weights."""
    for kernel, table in TABLE.items():
        for dtype in (torch.bfloat16, torch.float32):
            for head_dim, listed in table[arch][dtype.itemsize].items():
                for launch in dict.fromkeys(listed):
                    for case in _cases(kernel, launch):
                        yield launch_job(arch, kernel, launch, case, head_dim, dtype)
    for query_bytes, largest in LARGEST_HEAD_DIM.items():
        head_dims = [head_dim for head_dim in (64, 128, 256, 512) if head_dim <= largest]
        calls = product((16, 32), (query_bytes,), (1, query_bytes), head_dims, (False, True))
        yield from (_decode_job(*call) for call in calls)
    for dtype, (average_heads, case) in product(
        (torch.bfloat16, torch.float32), ((True, "full"), (True, "scores"), (False, "scores"))
    ):
        yield _weights_job(dtype, average_heads, case)


def _cases(kernel: str, launch: Launch) -> tuple[str, ...]:
    """Names of the example calls that a launch has to serve."""
    if kernel == "attention_backward_bias":
        return BIAS_CASES
    if launch.WARP_SPECIALIZE:
        return ("causal", "full")
    return LIGHT_CASES if launch.light else HEAVY_CASES


def launch_job(
    arch: int, kernel: str, launch: Launch, case: str, head_dim: int, dtype: torch.dtype
) -> Job:
    """One kernel, launched so, for the example call of that name.

    Two may spill: fp32, whose three tf32 products keep operands in registers twice, and the
    gradient of a bias at head_dim 512.
    """
    # odd sizes are gated up to 128 on sm_90 only: they are rare, and may spill a few registers
    aligned = launch.TMA or launch.light or head_dim > 128 or arch == 80

    def run() -> None:
        a = example(case, head_dim, dtype, aligned)
        with forced(**{kernel: launch}):
            if kernel == "attention_forward":
                forward(a)
            else:
                out, lse = empty_outputs(a)
                need_bias = kernel == "attention_backward_bias"
                backward(a, out, lse, out, None, need_bias=need_bias, need_sinks=False)

    flags = "".join(f" {n}" for n in ("TMA", "WARP_SPECIALIZE", "light") if getattr(launch, n))
    tiles = f"{launch.BLOCK_M}x{launch.BLOCK_N} warps {launch.num_warps} stages {launch.num_stages}"
    may_spill = dtype.itemsize == 4 or (kernel == "attention_backward_bias" and head_dim > 256)
    rows = launch.BLOCK_N if kernel == "attention_backward_key" else launch.BLOCK_M
    return Job(
        f"{kernel} {str(dtype)[6:]} D{head_dim} {tiles}{flags}: {case}",
        kernel,
        run,
        partial(_launch_rules, launch, dtype.itemsize == 2 and rows >= 64),
        may_spill,
    )


def _launch_rules(launch: Launch, wgmma: bool, arch: int, code: Compiled) -> dict[str, bool]:
    """What the launch promises; ``wgmma``: its tiles suffice for Hopper's products."""
    return {
        f"has {code.wgmma} wgmma": code.wgmma > 0 or not (wgmma and arch == 90),
        f"has {code.wgmma + code.mma} tensor core products": code.wgmma + code.mma > 0,
        f"has {code.tma} TMA loads": (code.tma > 0) == (launch.TMA and arch == 90),
        f"has {code.setmaxnreg} setmaxnreg": (code.setmaxnreg > 0) == launch.WARP_SPECIALIZE,
    }


def _decode_job(
    group_rows: int, query_bytes: int, cache_bytes: int, head_dim: int, paged: bool
) -> Job:
    """attention_decode for ``group_rows`` queries of a key head and a long cache."""
    batch, heads_kv, pages, page_size = 2, 2, 512, 16
    dtype = torch.bfloat16 if query_bytes == 2 else torch.float32
    quantized = cache_bytes == 1

    def run() -> None:
        query = meta(batch, heads_kv * group_rows, 1, head_dim, dtype=dtype)
        shape = (pages, heads_kv, page_size) if paged else (batch, heads_kv, pages * page_size)
        cache = meta(*shape, head_dim, dtype=torch.int8 if quantized else dtype)
        factors = meta(*shape, dtype=torch.float32) if quantized else None
        table = meta(batch, pages, dtype=torch.int32) if paged else None
        lengths = meta(batch, dtype=torch.int32)
        decode(query, cache, cache, lengths, table, factors, factors, None, None, 0.1, -1, 0.0)

    name = f"attention_decode {group_rows} rows of {query_bytes} bytes, D{head_dim}, "
    name += f"cache of {cache_bytes} bytes{' in pages' * paged}"
    return Job(
        name, "attention_split", run,
        lambda _, code: {f"has {code.mma} tensor core products": code.mma > 0},
    )  # fmt: skip


def _weights_job(dtype: torch.dtype, average_heads: bool, case: str) -> Job:
    def run() -> None:
        a = example(case, 128, dtype, aligned=True)
        recompute(a, meta(*a.scores_shape[:3], dtype=torch.float32), average_heads)

    def rules(arch: int, code: Compiled) -> dict[str, bool]:
        products = code.wgmma if arch == 90 else code.mma
        return {f"has {products} tensor core products": products > 0}

    heads = "mean of heads" if average_heads else "every head"
    name = f"attention_weights {str(dtype)[6:]} D128 {heads}: {case}"
    return Job(name, "attention_weights", run, rules)
