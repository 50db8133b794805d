"""Comparison of a layer with torch.nn's: output and every gradient, within the error budget."""

import copy
import warnings

import pytest
import torch

from llmos_fast.testing import assert_close_to_truth


def _run(module, inputs, kwargs, direction, dtype):
    """Output (where ``direction`` weighs it) and gradients of inputs and parameters."""
    cast = lambda t: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t  # noqa: E731
    module = copy.deepcopy(module).to(dtype)
    inputs = [cast(t.detach()).requires_grad_() for t in inputs]
    kwargs = {name: cast(value) for name, value in kwargs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.nn warns about its own masks and nested tensors
        out = module(*inputs, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    out = out * (direction != 0)
    parameters = dict(module.named_parameters())
    leaves = [*inputs, *parameters.values()]
    gradients = torch.autograd.grad(
        (out * direction.to(dtype)).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    names = [*(f"input {i}" for i in range(len(inputs))), *parameters]
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


@pytest.fixture
def agree():
    """Assert that ``ours`` computes what ``theirs`` does; ``valid`` selects the rows that count."""

    def compare(ours, theirs, inputs, kwargs=None, *, valid=None, dtype=torch.float32):
        kwargs = kwargs or {}
        shape = inputs[0].shape
        direction = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        direction = direction + direction.sign()  # away from zero, which means "does not count"
        if valid is not None:
            direction = direction * valid.unsqueeze(-1)
        inputs = [t.to(dtype) for t in inputs]
        truth = _run(theirs, inputs, kwargs, direction, torch.float64)
        eager = _run(theirs, inputs, kwargs, direction, dtype)
        out = _run(ours, inputs, kwargs, direction, dtype)
        for name, true in truth.items():
            assert_close_to_truth(out[name], eager[name], true, reduction=1024, name=name)

    return compare


@pytest.fixture
def copies():
    """A pair (ours, theirs) of one torch.nn class name with the same weights, dropout off."""

    def make(ours, theirs, *args, **kwargs):
        torch.manual_seed(0)
        mine = ours(*args, **kwargs)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = theirs(*args, **kwargs)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():  # biases of zero hide mistakes
            for parameter in reference.parameters():
                if parameter.dim() < 2:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        mine.load_state_dict(reference.state_dict())
        return mine, reference

    return make
