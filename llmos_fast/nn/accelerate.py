"""Existing models: torch.nn's Transformer layers become llmos_fast's, in place, and back."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from llmos_fast.nn.attention import MultiheadAttention
from llmos_fast.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from llmos_fast.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from llmos_fast.nn.transformer import Transformer

_FASTER: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
    nn.Transformer: Transformer,
}
_ORIGINAL = {ours: theirs for theirs, ours in _FASTER.items()}


class Report(NamedTuple):
    """What ``accelerate`` or ``restore`` did.

    Attributes:
        changed: names of the modules that changed their class; "" is the model itself.
        left: (name, reason) for each module that looks like one of them and was left alone.
    """

    changed: list[str]
    left: list[tuple[str, str]]


def accelerate(model: nn.Module) -> Report:
    """Give every torch.nn Transformer layer in ``model`` the class of llmos_fast's, in place.

    Modules, parameters, modes, hooks and names stay the same objects, so optimizers and references
    stay valid. Classes that a user derived from torch.nn's are left alone: their overridden methods
    are written for torch.nn.
    """
    return _change_classes(model, _FASTER)


def restore(model: nn.Module) -> Report:
    """Undo ``accelerate``: torch.nn's classes for llmos_fast's, where torch.nn has the options."""
    return _change_classes(model, _ORIGINAL)


def _change_classes(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> Report:
    changed: list[str] = []
    left: list[tuple[str, str]] = []
    beyond = set() if classes is _FASTER else _beyond_torch(model)
    for name, module in model.named_modules():
        target = classes.get(type(module))
        if target is None:
            if isinstance(module, tuple(classes)) and type(module) not in classes.values():
                left.append((name, f"{type(module).__name__} is a class derived from torch.nn's"))
        elif module in beyond:
            left.append((name, "uses options that torch.nn does not have"))
        else:
            module.__class__ = target
            changed.append(name)
    return Report(changed, left)


def _beyond_torch(model: nn.Module) -> set[nn.Module]:
    """Modules with options beyond torch.nn, and all that contain one."""
    return {
        module
        for module in model.modules()
        if type(module) in _ORIGINAL and any(_has_options(part) for part in module.modules())
    }


def _has_options(module: nn.Module) -> bool:
    names = ("linear_up", "positions", "in_proj", "q_proj")
    if isinstance(module, MultiheadAttention):
        reduced = module.num_kv_heads is not None
        if reduced or module.rotary_base is not None or module.window is not None:
            return True
    return type(module) in _ORIGINAL and any(name in module._modules for name in names)
