"""Other engines' inference by an encoder of torch.nn, for bench_encoder_inference.py.

A peer is a function ``make(encoder, x, visible)`` of a torch.nn.TransformerEncoder (post-norm,
GELU, batch first), x: Float[batch seq width] and visible: Bool[batch seq] or None. It converts the
model, once, and returns ``run()``, which gives Float[batch seq width]; what it says of hidden
positions does not count. An engine that is not installed, or refuses the model, raises.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quant_peers import openvino_compiled, openvino_run, ort_session, round_int8

Run = Callable[[], Tensor]
Make = Callable[[nn.TransformerEncoder, Tensor, Tensor | None], Run]


def torch_nn(
    encoder: nn.TransformerEncoder, x: Tensor, visible: Tensor | None, dtype: torch.dtype
) -> Run:
    """The fast path: evaluation without gradients, padding left out in nested tensors."""
    model = copy.deepcopy(encoder).to(dtype).eval()
    narrow, hidden = x.to(dtype), None if visible is None else ~visible

    @torch.no_grad()
    def run() -> Tensor:
        return model(narrow, src_key_padding_mask=hidden)

    return run


# ---- What is exported: the operators that engines know from BERT, one by one ----


class PlainLayer(nn.Module):
    """A layer with three projections, and a mask that is added to the scores."""

    def __init__(self, layer: nn.TransformerEncoderLayer):
        super().__init__()
        attention = layer.self_attn
        self.heads = attention.num_heads
        parts = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        self.query, self.key, self.value = (linear(weight, bias) for weight, bias in parts)
        self.out = linear(attention.out_proj.weight, attention.out_proj.bias)
        self.norm1, self.norm2 = layer.norm1, layer.norm2
        self.linear1, self.linear2 = layer.linear1, layer.linear2

    def forward(self, x: Tensor, added: Tensor | None) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], self.heads, -1).permute(0, 2, 1, 3)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if added is not None:
            scores = scores + added
        heads = (scores.softmax(-1) @ value).permute(0, 2, 1, 3).contiguous()
        x = self.norm1(self.out(heads.view(*x.shape)) + x)
        return self.norm2(self.linear2(F.gelu(self.linear1(x))) + x)


class PlainEncoder(nn.Module):
    """The encoder's weights, copied. Called with ``visible`` as Int64[batch seq], 1 or 0."""

    def __init__(self, encoder: nn.TransformerEncoder):
        super().__init__()
        self.layers = nn.ModuleList(PlainLayer(layer) for layer in copy.deepcopy(encoder.layers))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        added = None
        if visible is not None:
            added = (1.0 - visible[:, None, None, :].float()) * -10000.0
        for layer in self.layers:
            x = layer(x, added)
        return x


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    module = nn.Linear(*weight.shape[::-1])
    module.weight.data, module.bias.data = weight.detach().clone(), bias.detach().clone()
    return module


def inputs(x: Tensor, visible: Tensor | None) -> tuple[Tensor, ...]:
    return (x,) if visible is None else (x, visible.long())


def torch_int8(encoder: nn.TransformerEncoder, x: Tensor, visible: Tensor | None) -> Run:
    """torch.ao's dynamically quantized products on oneDNN."""
    torch.backends.quantized.engine = "onednn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao
        model = torch.ao.quantization.quantize_dynamic(PlainEncoder(encoder), {nn.Linear})
    arguments = inputs(x, visible)

    @torch.no_grad()
    def run() -> Tensor:
        return model(*arguments)

    return run


# ---- onnxruntime ----


def onnxruntime(
    encoder: nn.TransformerEncoder, x: Tensor, visible: Tensor | None, int8: bool
) -> Run:
    """After its optimizer for BERT; int8 by its dynamic quantization, a scale for each column."""
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    arguments, attention = inputs(x, visible), encoder.layers[0].self_attn
    names = ["x", "visible"][: len(arguments)]
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter without onnxscript is deprecated
        exported, path = Path(name, "exported.onnx"), Path(name, "optimized.onnx")
        torch.onnx.export(
            PlainEncoder(encoder),
            arguments,
            str(exported),
            input_names=names,
            opset_version=17,
            dynamo=False,
        )
        sizes = {"num_heads": attention.num_heads, "hidden_size": attention.embed_dim}
        # its own passes first would hide attention and the bias of GELU from those for BERT
        optimized = optimize_model(str(exported), "bert", **sizes, opt_level=0)
        optimized.save_model_to_file(str(path))
        if int8:
            quantized = Path(name, "quantized.onnx")
            # shape inference does not know its optimizer's operators
            options = {"DefaultTensorType": TensorProto.FLOAT}
            quantize_dynamic(
                path,
                quantized,
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options=options,
            )
            path = quantized
        session = ort_session(path.read_bytes())
    feed = {name: tensor.numpy() for name, tensor in zip(names, arguments, strict=True)}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


# ---- OpenVINO ----


def openvino(
    encoder: nn.TransformerEncoder,
    x: Tensor,
    visible: Tensor | None,
    precision: str = "f32",
    int8: bool = False,
) -> Run:
    """Converted from torch; int8 weights, and activations rounded to int8 in groups of 32."""
    import openvino as ov

    arguments = inputs(x, visible)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's tracer
        model = ov.convert_model(PlainEncoder(encoder), example_input=arguments)
    settings: dict[str, Any] = {}
    kept = compress_products(model) if int8 else []
    if int8:
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 32
    compiled = openvino_compiled(model, precision, **settings)
    return openvino_run(compiled, *arguments, owned=kept)


def compress_products(model: Any) -> list[np.ndarray]:
    """Weights of all products as int8 with a scale for each output; gives what must live on."""
    import openvino.opset13 as op

    kept = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        source = node.input_value(1).get_node()
        if source.get_type_name() != "Constant":
            continue
        codes, scales = (p.numpy() for p in round_int8(torch.from_numpy(source.get_data().copy())))
        kept.append(codes)
        matrix = op.multiply(op.convert(op.constant(codes), np.float32), op.constant(scales))
        node.input(1).replace_source_output(matrix.output(0))
    if not kept:
        raise ValueError("openvino: no product by a constant was found")
    return kept


FP32, BF16 = torch.float32, torch.bfloat16
PEERS: dict[str, dict[str, Make]] = {
    "fp32": {
        "torch.nn": partial(torch_nn, dtype=FP32),
        "onnxruntime": partial(onnxruntime, int8=False),
        "openvino": openvino,
    },
    "bf16": {
        "torch.nn": partial(torch_nn, dtype=BF16),
        "openvino": partial(openvino, precision="bf16"),
    },
    "int8": {
        "torch_dynamic": torch_int8,
        "onnxruntime": partial(onnxruntime, int8=True),
        "openvino": partial(openvino, int8=True),
        "openvino_bf16": partial(openvino, int8=True, precision="bf16"),
    },
}
