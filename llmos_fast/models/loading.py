"""``build`` and ``load``: models from the configs and checkpoints of others, and of our own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmos_fast.checkpoints import Source, open_source
from llmos_fast.checkpoints.safetensors_folder import WHOLE
from llmos_fast.checkpoints.storage import current_folder, read_tensors
from llmos_fast.models.families import family_of
from llmos_fast.models.pretrained import METHOD, Pretrained, Quantization
from llmos_fast.nn.quantize_model import replace_by_quantized_
from llmos_fast.quantize import QuantizedWeight, format_of, quantize

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def build(hf_config: Mapping[str, Any], device: torch.device | str | None = None) -> Pretrained:
    """A new model from what Hugging Face's config.json would say, with weights that are drawn.

    Raises ValueError for a family that is not known, and for options that are not.
    """
    config = dict(hf_config)
    family = family_of(config)
    with torch.device(device or torch.get_default_device()):
        model: Pretrained = family.build(family.config(config), config)  # type: ignore[assignment]
    model.family, model.hf_config = family, config
    return model


def load(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    scheme: str | None = None,
    group_size: int = 32,
    method: str = "mse",
    embeddings: bool = True,
    skip: Sequence[str] = (),
) -> Pretrained:
    """A model from a checkpoint, in evaluation mode.

    path:   a folder of Hugging Face's (config.json, safetensors) or of ``model.save``, a GGUF file,
            a llama2.c file, or a name of the hub
    dtype:  of the weights that stay floating point; None keeps what the checkpoint has, fp32 for
            fp16, which CPUs do not multiply, and fp32 with a scheme. Without dtype and scheme,
            weights that a GGUF file has quantized get the closest of our schemes, with groups of 32
    scheme: quantize linear layers as they are read, as ``llmos_fast.quantize`` names it; a weight
            is never there twice
    group_size, method: as in ``llmos_fast.quantize``
    embeddings: quantize embeddings, too
    skip:   names of layers that are not quantized; ``*`` matches anything

    Weights that are stored as the model has them stay in the file, memory-mapped.

    Raises ValueError for a checkpoint that is damaged, that does not fit its config, or whose
    weights are pickled; FileNotFoundError where there is none.
    """
    source = open_source(current_folder(Path(path)) if Path(path).parent.is_dir() else path)
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"load: dtype must be a floating-point one, got {dtype}")
    if scheme is not None:
        format_of(scheme)
    stored = source.config.get("quantization_config")
    model = _unfilled(source)
    if stored is not None:
        if scheme is not None:
            raise ValueError(f"load: scheme must be None for a quantized checkpoint, got {scheme}")
        return _load_quantized(model, source, stored, dtype).eval()
    schemes = _stored_schemes(source, model) if scheme is None and dtype is None else {}
    if scheme is not None:
        schemes = {name: scheme for name, _ in model.named_parameters()}
    reading = _Reading(source, model, dtype, bool(schemes))
    if schemes:
        _quantize_unread(model, reading, schemes, group_size, method, embeddings, skip)
    _fill(model, reading)
    reading.finish()
    if schemes:
        model.to(reading.dtype)  # what quantized embeddings make
    return model.eval()


class _NothingDrawn(TorchFunctionMode):
    """Leaves parameters as they are: torch's way to draw them on "meta" imports its compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _unfilled(source: Source) -> Pretrained:
    """The model of a checkpoint, of which no parameter has memory."""
    with _NothingDrawn():
        return build(source.config, "meta")


def _stored_schemes(source: Source, model: Pretrained) -> dict[str, str]:
    """By our parameters' names, the schemes of what the checkpoint has quantized."""
    assert model.family is not None
    family, schemes = model.family, dict[str, str]()
    for name, _ in model.named_parameters():
        theirs = [source.schemes.get(family.prefixed(part)) for part in family.sources(name)]
        known = sorted(scheme for scheme in theirs if scheme is not None)
        if known:
            schemes[name] = known[-1]  # of parts that differ int8, which comes after int4
    return schemes


def _quantize_unread(
    model: Pretrained,
    reading: _Reading,
    schemes: Mapping[str, str],
    group_size: int,
    method: str,
    embeddings: bool,
    skip: Sequence[str],
) -> None:
    """Quantized layers in the place of those in ``schemes``; weights are read one by one."""
    names = {id(p): name for name, p in model.named_parameters()}
    usual, others = Counter(schemes.values()).most_common(1)[0][0], dict[str, str]()
    float_layers = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and names[id(module.weight)] not in schemes
    ]
    skip = [*skip, *float_layers]

    def quantized(path: str, weight: Tensor) -> QuantizedWeight:
        name = names[id(weight)]
        if schemes[name] != usual:
            others[path] = schemes[name]
        return quantize(reading(name, weight, cast=False), schemes[name], group_size, method)

    replace_by_quantized_(model, quantized, quantized if embeddings else None, skip)
    model.quantization = Quantization(usual, group_size, others, embeddings, skip)


class _Reading:
    """Parameters of a model from a checkpoint's tensors, and an account of what was used."""

    def __init__(
        self, source: Source, model: Pretrained, dtype: torch.dtype | None, quantizes: bool
    ):
        assert model.family is not None
        self._tensors, self._family = source.tensors, model.family
        self._projection_rows = model.config.projection_rows
        self.dtype = torch.float32 if dtype is None and quantizes else dtype
        self._used: set[str] = set()

    def __call__(self, name: str, like: Tensor, cast: bool = True) -> Tensor:
        """Our parameter ``name``, which must have the shape of ``like``."""
        sources = self._family.sources(name)
        transposed = self._family.is_transposed(name)
        first, *rest = like.shape[::-1] if transposed else like.shape
        rows = self._projection_rows[-len(sources) :] if len(sources) > 1 else [first]
        parts = [self._part(s, (count, *rest)) for s, count in zip(sources, rows, strict=True)]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if transposed:
            tensor = tensor.t()
        if not cast:
            return tensor
        dtype = self.dtype
        if dtype is None:
            dtype = torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
        return tensor.to(dtype).contiguous()

    def finish(self) -> None:
        """Raise ValueError where the checkpoint has tensors that the model has no use for."""
        family = self._family
        known = {name for used in self._used for name in (used, family.prefixed(used))}
        extra = [
            name
            for name in self._tensors
            if name not in known and not family.is_ignored(name.removeprefix(family.prefix))
        ]
        # what is tied may be stored all the same
        extra = [name for name in extra if not family.is_head(name.removeprefix(family.prefix))]
        if extra:
            raise ValueError(
                f"load: the checkpoint must hold the model's tensors only, got {len(extra)} more, "
                f"{extra[0]!r} first"
            )

    def _part(self, source: str, shape: tuple[int, ...]) -> Tensor:
        name = next((n for n in self._family.spellings(source) if n in self._tensors), None)
        if name is None:
            raise ValueError(f"load: the checkpoint must hold {source!r}, got none")
        self._used.add(name)
        tensor = self._tensors[name]
        if tensor.shape != shape or tensor.dtype not in FLOATS:
            raise ValueError(
                f"load: {name} must be a floating-point tensor of shape {shape}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        return tensor


def _fill(model: nn.Module, reading: _Reading) -> None:
    """Put what is read in the place of every parameter that is still without memory."""
    filled: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for attribute, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in filled:
                name = f"{path}.{attribute}" if path else attribute
                filled[id(parameter)] = nn.Parameter(reading(name, parameter))
            module._parameters[attribute] = filled[id(parameter)]


def _load_quantized(
    model: Pretrained, source: Source, stored: Any, dtype: torch.dtype | None
) -> Pretrained:
    """A checkpoint of ``model.save``."""
    if not isinstance(stored, dict) or stored.get("quant_method") != METHOD:
        method = stored.get("quant_method") if isinstance(stored, dict) else stored
        raise ValueError(
            f"load: quant_method of config.json must be {METHOD}, got {method!r}; load the "
            "floating-point checkpoint with scheme=..."
        )
    assert source.folder is not None
    named = {str(known)[6:]: known for known in FLOATS}
    name = source.config.get("dtype")
    if not isinstance(name, str) or name not in named:
        raise ValueError(f"load: dtype of config.json must be in {', '.join(named)}, got {name!r}")
    try:
        quantization = Quantization(**{k: v for k, v in stored.items() if k != "quant_method"})
        quantization.empty_(model)
        model.load_state_dict(read_tensors(source.folder / WHOLE), assign=True)
    except (TypeError, AttributeError, RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"load: {source.folder} is damaged: {error}") from error
    model.quantization = quantization
    return model.to(dtype or named[name])
