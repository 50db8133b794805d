"""The exact test of a launch: what is right passes, and one wrong term in any row is seen."""

import pytest
import torch
import triton
import triton.language as tl
from llmos_fast.kernels import attention_backward, attention_exact, attention_forward, self_test
from llmos_fast.kernels.launch import Launch, Variant

CPU = torch.device("cpu")
FORWARD, KEY, QUERY = self_test.KERNELS
TILES = Launch(32, 32, 4, 1, TMA=True)


def variant(kernel=FORWARD, tiles=TILES, dtype=torch.bfloat16, hides=False):
    return Variant(kernel, tiles, 64, dtype, hides)


@pytest.fixture
def small(monkeypatch):
    """Two rows and two columns of interpreted tiles, once."""
    monkeypatch.setattr(self_test, "SIZES", ((1, 48),))
    monkeypatch.setattr(self_test, "ROUNDS", 1)


# what the numbers must be


@pytest.mark.parametrize(
    ("seq", "head_dim", "causal"), [(1040, 64, True), (1040, 512, False), (528, 128, True)]
)
def test_16_bits_hold_everything(seq, head_dim, causal):
    forward = attention_exact.forward_problem(seq, head_dim, causal)
    backward = attention_exact.backward_problem(seq, head_dim, causal)
    for name, x in [*forward.inputs.items(), *backward.inputs.items(), *backward.results.items()]:
        if name != "lse":
            assert torch.equal(x.bfloat16().float(), x), name
            assert torch.equal(x.half().float(), x), name
            assert name not in ("query", "value", "d_out") or (x != 0).all(), name
    # the factor of the scores is 1 in fp32
    assert torch.tensor(forward.scale) * torch.tensor(1.4426950408889634) == 1.0


@pytest.mark.parametrize("causal", [False, True])
def test_problems_are_what_the_definition_says(causal):
    def float64(problem):
        inputs = {name: x.double() for name, x in problem.inputs.items()}
        key, value = (inputs[name].repeat_interleave(2, 0) for name in ("key", "value"))
        s = problem.scale * inputs["query"] @ key.mT
        hidden = torch.ones(80, 80).triu(1).bool() & causal
        return inputs, key, value, s.masked_fill(hidden, -torch.inf)

    problem = attention_exact.forward_problem(80, 64, causal)
    _, _, value, s = float64(problem)
    assert torch.equal((s.softmax(-1) @ value).float(), problem.results["out"])
    assert torch.equal(s.exp().sum(-1).float(), problem.results["weight"])

    problem = attention_exact.backward_problem(80, 64, causal)
    inputs, key, value, s = float64(problem)
    p = (s - inputs["lse"][..., None]).exp()
    delta = (inputs["out"] * inputs["d_out"]).sum(-1, keepdim=True)
    ds = p * (inputs["d_out"] @ value.mT - delta)
    of_heads = {
        "d_query": ds @ key,
        "d_key": ds.mT @ inputs["query"],
        "d_value": p.mT @ inputs["d_out"],
    }
    for name, x in of_heads.items():
        x = x if name == "d_query" else x.view(2, 2, 80, 64).sum(1)
        # lse is ln 2 in fp32
        assert torch.equal(x.round().float(), problem.results[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seq", [seq for _, seq in self_test.SIZES])
def test_one_wrong_term_shows_after_rounding_and_rounding_does_not(seq, dtype):
    """The smallest term of any row, lost or taken from another class, in at least one column."""
    problem = attention_exact.forward_problem(seq, 64, causal=False)
    out, weight = problem.results["out"], problem.results["weight"][..., None]
    lost = (out - out / weight).to(dtype)
    assert (lost != out).any(-1).all()
    other = problem.inputs["value"].roll(1, 1).repeat_interleave(2, 0)
    taken = (out + (other - out) / weight).to(dtype)
    assert torch.equal((taken != out).any(-1), (other != out).any(-1))
    # what exp2, log2 and a reciprocal of the GPU may err by
    for error in (-(2.0**-20), 2.0**-20):
        assert torch.equal((out * (1 + error)).to(dtype).float(), out)
        assert torch.equal((weight.log() * (1 + error)).exp().round(), weight)


# what passes and what does not


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("kernel", self_test.KERNELS)
def test_kernels_pass(kernel, hides, small):
    assert self_test.passes(variant(kernel, hides=hides), CPU)


def test_fp16_and_several_launches_pass(monkeypatch):
    monkeypatch.setattr(self_test, "SIZES", ((2, 32), (1, 40)))
    monkeypatch.setattr(self_test, "ROUNDS", 2)
    assert self_test.passes(variant(tiles=Launch(16, 32, 4, 1), dtype=torch.float16), CPU)


@triton.jit
def stale_dot(a, b, acc, PRECISION: tl.constexpr):
    """Row 3 of a left operand that comes from registers is overwritten by row 4."""
    if acc is None:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        a = a.to(tl.float32)
        rows = tl.arange(0, 32)[:, None]
        fourth = tl.sum(tl.where(rows == 4, a, 0.0), 0)[None, :]
        product = tl.dot(tl.where(rows == 3, fourth, a), b.to(tl.float32), acc)
    return product


@triton.jit
def short_range(tile_list, batch, head, tile, low, high, BLOCK: tl.constexpr):
    """The last tile is left out."""
    return low // BLOCK, tl.cdiv(high, BLOCK) - 1


@pytest.mark.parametrize("mutant", [stale_dot, short_range], ids=["stale_dot", "short_range"])
@pytest.mark.parametrize("kernel", self_test.KERNELS)
def test_wrong_kernels_fail(kernel, mutant, small, monkeypatch):
    module = attention_forward if kernel == FORWARD else attention_backward
    monkeypatch.setattr(module, "dot" if mutant is stale_dot else "tile_range", mutant)
    assert not self_test.passes(variant(kernel), CPU)


@pytest.mark.parametrize(
    ("kernel", "name"), [(FORWARD, "value"), (KEY, "query"), (KEY, "d_out"), (QUERY, "key")]
)
def test_two_tiles_in_each_others_place_fail(kernel, name, small, monkeypatch):
    make = "forward_problem" if kernel == FORWARD else "backward_problem"
    original = getattr(self_test, make)

    def swapped(*args):
        problem = original(*args)
        tiles = problem.inputs[name].unflatten(1, (3, 16))
        inputs = problem.inputs | {name: tiles[:, [1, 0, 2]].flatten(1, 2)}
        return problem._replace(inputs=inputs)

    monkeypatch.setattr(self_test, make, swapped)
    assert not self_test.passes(variant(kernel), CPU)


@pytest.mark.parametrize(
    ("kernel", "index"), [(FORWARD, 0), (FORWARD, 1), (QUERY, 0), (KEY, 1), (KEY, 2)]
)
@pytest.mark.parametrize("wrong", ["one step", "nan"])
def test_one_wrong_number_fails(kernel, index, wrong, small, monkeypatch):
    name = "forward" if kernel == FORWARD else "backward"
    original = getattr(self_test, name)

    def corrupted(*args, **kwargs):
        results = original(*args, **kwargs)
        found = results[index]
        last = (-1,) * found.dim()
        if wrong == "nan":
            found[last] = torch.nan
        elif found.dtype == torch.float32:  # the log-sum-exp: an integer more under the logarithm
            found[last] = found[last].exp().add(1).log()
        else:  # the next number that 16 bits hold
            found.view(torch.int16)[last] += 1
        return results

    monkeypatch.setattr(self_test, name, corrupted)
    assert not self_test.passes(variant(kernel), CPU)


@pytest.mark.parametrize("error", [-(2.0**-21), 2.0**-21])
def test_the_rounding_of_a_logarithm_is_no_alarm(error, small, monkeypatch):
    original = self_test.forward

    def rounded(a):
        out, lse = original(a)
        return out, lse * (1 + error)

    monkeypatch.setattr(self_test, "forward", rounded)
    assert self_test.passes(variant(), CPU)


@pytest.mark.parametrize("kernel", [FORWARD, KEY])
def test_surroundings_do_not_matter_and_stay_as_they_are(kernel, small):
    state = torch.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu"), torch.inference_mode():
        assert self_test.passes(variant(kernel), CPU)
    assert torch.equal(torch.get_rng_state(), state)
