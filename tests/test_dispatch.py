"""The choice of an implementation: order, force, refusal, and what the environment says."""

import os
import subprocess
import sys

import pytest
import torch

import llmos_fast
from llmos_fast import explain, ops, use
from llmos_fast.dispatch import FOLDERS, registered
from llmos_fast.info import _row
from llmos_fast.testing import random


def run_python(code, **environment):
    """Output of a fresh interpreter; its error text where it fails."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or result.stderr.strip()


def test_every_op_ends_at_its_reference():
    assert set(registered()) == set(ops.__all__)
    for implementations in registered().values():
        names = [i.name for i in implementations]
        assert names[-1] == "reference"
        assert names == [name for name in FOLDERS if name in names]


def test_reference_has_the_same_functions():
    x, weight = random(3, 4), random(5, 4)
    assert torch.equal(
        llmos_fast.reference.linear(x, weight), ops.linear(x, weight, impl="reference")
    )


def test_use_forces_inside_the_block_only():
    x, weight = random(3, 4, dtype=torch.float64), random(5, 4, dtype=torch.float64)
    with use("native"), pytest.raises(ValueError, match=r"linear\(impl='native'\): native needs"):
        ops.linear(x, weight)
    ops.linear(x, weight)
    with use("native"):
        ops.linear(x, weight, impl="reference")  # the argument is nearer to the call


def test_forced_implementation_that_an_op_does_not_have():
    with pytest.raises(ValueError, match=r"no such implementation; this op has: .*reference"):
        ops.linear(random(3, 4), random(5, 4), impl="fast")
    with pytest.raises(ValueError, match="use: name must be one of"), use("fast"):
        pass


def test_explain_computes_nothing_and_checks_the_call():
    x = random(3, 4, dtype=torch.float16)
    assert explain(ops.linear, x, random(5, 4, dtype=torch.float16)) == [
        ("native", "needs float32 or bfloat16, got torch.float16"),
        ("reference", None),
    ]
    with pytest.raises(ValueError, match="linear: last dimension of x"):
        explain(ops.linear, x, random(5, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match="explain: op must be one of"):
        explain(torch.relu, x)


def test_environment_forces_the_implementation():
    code = (
        "import torch; from llmos_fast import ops\n"
        "x = torch.ones(2, 2, dtype=torch.float64)\n"
        "try: ops.linear(x, x)\n"
        "except ValueError as error: print(error)"
    )
    assert "native needs float32" in run_python(code, LLMOS_FAST_IMPL="native")


def test_environment_forces_the_instruction_set():
    code = "import torch; from llmos_fast import _C; print(_C.forced_cpu())"
    assert run_python(code, LLMOS_FAST_CPU="generic") == "generic"
    assert "LLMOS_FAST_CPU=sse9 is not one of: " in run_python(
        "import torch; from llmos_fast import ops; ops.linear(torch.ones(2, 2), torch.ones(2, 2)); "
        "ops.dropout(torch.ones(2, 2), 0.5)",
        LLMOS_FAST_CPU="sse9",
    )


def test_runs_on_the_reference_without_the_extension():
    """As after an install without a compiler."""
    code = (
        "import sys; sys.modules['llmos_fast._C'] = None\n"
        "import torch, llmos_fast\n"
        "from llmos_fast import ops, explain\n"
        "x = torch.ones(2, 3)\n"
        "ops.linear(x, x); ops.dropout(x, 0.5); ops.add_norm(x, x, None)\n"
        "print(explain(ops.linear, x, x)[0].reason)"
    )
    assert run_python(code).startswith("cannot be imported")


def test_table_says_what_runs_and_why_not():
    refusals = [("native", "needs CPU"), ("triton", None), ("reference", None)]
    assert _row(refusals) == ["needs CPU", "runs", "would run"]
    assert _row(refusals[1:]) == ["not written", "runs", "would run"]


def test_module_prints_the_table():
    result = subprocess.run(
        [sys.executable, "-m", "llmos_fast"], capture_output=True, text=True, check=True
    )
    for op in ops.__all__:
        assert op in result.stdout
