"""Contract of the quantized linear op."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos_fast import dispatch
from llmos_fast.quantize import QuantizedWeight, pair_multiple

ACTIVATIONS = (None, "relu", "relu2", "gelu", "gelu_tanh", "silu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

dispatch.implementations("quant_matmul", "native", "triton")


def quant_matmul(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """activation(x W^T + bias) + residual with a weight from ``llmos_fast.quantize``.

    x: Float[... in_features], fp32, bf16, fp16 or fp64, any strides
    qweight: QuantizedWeight of shape (out_features, in_features), on x's device
    bias: Float[out_features], x's dtype or fp32
    activation: None, "relu", "relu2" (squared), "gelu", "gelu_tanh" or "silu"
    gated: qweight is ``interleave(gate, up)``, bias lies in the order of its rows, and the result
        is activation(x gate^T + bias_gate) * (x up^T + bias_up), out_features / 2 wide (SwiGLU)
    residual: as the result, added to it
    returns: Float[... out_features] in x's dtype; sums are fp32 (fp64 for fp64), rounded once

    Schemes without "_a16", but for nf4, first round x, in groups of qweight.group_size (whole rows
    for int8 and fp8) that have a scale each: in fp32, ``q = round_half_even(x * (most / amax))``,
    standing for ``q * (amax / most)``, where amax is the group's largest magnitude and at least
    1e-30. The int schemes have integers q and most = 127; their products are exact. The fp8 schemes
    have q in e4m3, subnormal numbers included, and most = 448, which nothing exceeds; on a GPU
    tensor cores sum 128 products at a time in less than fp32, and those sums are added in fp32. A
    row of x that is not finite gives NaN there. An empty x gives an empty result.

    Gradients go to x, bias and residual, never to the weight: dX = dY W, straight through the
    rounding of x (so an adapter beside a frozen quantized layer trains as in QLoRA, arXiv
    2305.14314).

    Raises ValueError for dtypes, devices, shapes and values that break these rules.
    """
    if not isinstance(qweight, QuantizedWeight):
        raise _error("qweight", "must be a QuantizedWeight", type(qweight).__name__)
    n, k = qweight.shape
    if x.dtype not in DTYPES:
        raise _error("x", "must be float32, bfloat16, float16 or float64", x.dtype)
    if x.ndim == 0 or x.shape[-1] != k:
        raise _error("x", f"must have {k} (in_features) as its last size", tuple(x.shape))
    if x.device != qweight.packed.device:
        raise _error("x", f"must be on qweight's device {qweight.device}", x.device)
    if bias is not None:
        _check_tensor("bias", bias, (n,), x)
        if bias.dtype not in (x.dtype, torch.float32):
            raise _error("bias", f"must be {x.dtype} or torch.float32", bias.dtype)
    if activation not in ACTIVATIONS:
        known = ", ".join(str(name) for name in ACTIVATIONS)
        raise _error("activation", f"must be one of {known}", repr(activation))
    if gated and n % (2 * pair_multiple(qweight.scheme)):
        raise _error("qweight", "must be interleave(gate, up) for gated=True", f"{qweight.shape}")
    if residual is not None:
        _check_tensor("residual", residual, (*x.shape[:-1], n // 2 if gated else n), x)
        if residual.dtype != x.dtype:
            raise _error("residual", f"must be {x.dtype}", residual.dtype)
    result: Tensor = dispatch.select(
        "quant_matmul",
        impl,
        x=x,
        qweight=qweight,
        bias=bias,
        activation=activation,
        gated=gated,
        residual=residual,
    )
    return result


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor.shape != shape:
        raise _error(name, f"must have shape {shape}", tuple(tensor.shape))
    if tensor.device != x.device:
        raise _error(name, f"must be on x's device {x.device}", tensor.device)


def _error(argument: str, rule: str, value: object) -> ValueError:
    return ValueError(f"quant_matmul: {argument} {rule}, got {value}")
