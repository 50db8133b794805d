"""What only a GPU can show of linear_cross_entropy: its launches at real sizes, memory, graphs."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: not run", allow_module_level=True)

from llmos_fast.kernels.launch import forced
from llmos_fast.kernels.linear_cross_entropy_jobs import KERNELS
from llmos_fast.kernels.product_launch import TABLE
from llmos_fast.kernels.runtime import architecture

from llmos_fast import ops, reference
from llmos_fast.testing import assert_within_budget, outputs_and_gradients, random

DEVICE = torch.device("cuda", torch.cuda.current_device())


def call(rows, features, classes, dtype=torch.bfloat16):
    """Tensors of a call; every seventh row is ignored."""
    target = torch.randint(0, classes, (rows,))
    target[::7] = -100
    shapes = {"hidden": (rows, features), "weight": (classes, features), "bias": (classes,)}
    scales = {"hidden": 1.0, "weight": 2 * features**-0.5, "bias": 1.0}
    tensors = {
        n: random(*s, dtype=dtype, scale=scales[n]).to(DEVICE).requires_grad_()
        for n, s in shapes.items()
    }
    return tensors | {"target": target.to(DEVICE)}


def check(tensors, **options):
    assert_within_budget(
        ops.linear_cross_entropy,
        reference.linear_cross_entropy,
        tensors,
        options,
        impl="triton",
        reduction=max(*tensors["weight"].shape, tensors["target"].numel()),
    )


ALL = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 8.0}
LAUNCHES = [
    (kernel, dtype, launch)
    for kernel in KERNELS
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for launch in TABLE[kernel][architecture(DEVICE)][dtype.itemsize][1]
]


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "everything"])
@pytest.mark.parametrize(("kernel", "dtype", "launch"), LAUNCHES, ids=str)
def test_every_launch_is_within_the_budget(kernel, dtype, launch, options, monkeypatch):
    # several chunks also of these classes
    monkeypatch.setattr("llmos_fast.kernels.linear_cross_entropy_backward.CHUNK_BYTES", 2**22)
    with forced(**{kernel: launch}):
        check(call(1111, 320, 5003, dtype), **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("rows", "features", "classes"),
    [(1, 768, 50257), (64, 768, 50257), (513, 77, 4099), (4096, 512, 50257)],
)
def test_sizes(rows, features, classes, reduction):
    if rows == 1 and reduction == "mean":
        pytest.skip("its only row is ignored")
    check(call(rows, features, classes), reduction=reduction)


def test_a_weight_of_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    classes, features = 2**20 + 300, 2056
    weight = torch.empty(classes, features, dtype=torch.bfloat16, device=DEVICE).normal_(std=0.02)
    hidden = torch.randn(64, features, dtype=torch.bfloat16, device=DEVICE)
    target = torch.full((64,), classes - 1, device=DEVICE)
    losses = ops.linear_cross_entropy(hidden, weight, target, reduction="none", impl="triton")
    logits = torch.cat([hidden.float() @ part.float().t() for part in weight.split(2**16)], dim=1)
    torch.testing.assert_close(losses, torch.logsumexp(logits, dim=1) - logits[:, -1])


def test_memory_is_bounded():
    """Not the logits, which are 3.3 GB in 32 bits: one chunk of their gradients in 16."""
    tensors = call(16384, 256, 50257)
    kept = sum(t.nbytes for t in tensors.values())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.linear_cross_entropy(**tensors, impl="triton").backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 3 * 2**27 + 2 * kept


def test_labels_far_from_the_vocabulary_do_not_fault():
    tensors = call(300, 128, 1000)
    tensors["target"][1:6] = torch.tensor([-1, 1000, 2**40, -(2**63), 2**63 - 1])
    ops.linear_cross_entropy(**tensors, impl="triton").backward()
    torch.cuda.synchronize()
    assert tensors["weight"].grad.isfinite().all()


def test_two_runs_agree_in_every_bit():
    tensors = call(5000, 512, 50257)
    first, second = (
        outputs_and_gradients(ops.linear_cross_entropy, tensors, {"impl": "triton"})
        for _ in range(2)
    )
    assert torch.equal(first[0][0], second[0][0])
    for name, gradient in first[1].items():
        assert torch.equal(gradient, second[1][name]), name


def test_a_graph_follows_its_inputs(captured):
    tensors = call(512, 256, 10000)
    wanted = [tensors[n] for n in ("hidden", "weight", "bias")]

    def run():
        loss = ops.linear_cross_entropy(**tensors, impl="triton")
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    graph, results = captured(run)
    for ignored in (3, 5):
        with torch.no_grad():
            tensors["hidden"].normal_()
        tensors["target"].random_(10000)[::ignored] = -100
        graph.replay()
        for replayed, eager in zip(results, run(), strict=True):
            assert torch.equal(replayed, eager)
