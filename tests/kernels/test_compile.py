"""Every launch of the kernels, compiled for GPUs that are not there, and judged.

No spills but where a job says so, shared memory within the limit, and the instructions that a
launch promises. Each launch is compiled for the example calls that it has to serve
(``gate.jobs``), not for every combination of features. Registers and shared
memory are compared with golden.json where it knows the versions of triton and ptxas; write its
entry anew with

    pytest tests/kernels/test_compile.py --write-golden
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from llmos_fast.kernels import gate, offline
from llmos_fast.kernels.attention_jobs import launch_job
from llmos_fast.kernels.launch import Launch
from llmos_fast.kernels.offline import Compiled, faults

GOLDEN = Path(__file__).parent / "golden.json"
PROCESSES = 2


def run(arch, part):
    """Lines of one process, which compiles: this one may interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "llmos_fast.kernels.gate", str(arch)]
    command += ["--part", str(part), "--of", str(PROCESSES)]
    with tempfile.TemporaryFile("w+") as errors:
        result = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, check=False
        )
        errors.seek(0)
        assert result.returncode == 0, errors.read()[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("arch", [90, 80])
def test_every_launch_passes_the_gate(arch, pytestconfig):
    with ThreadPoolExecutor(PROCESSES) as pool:
        parts = list(pool.map(lambda part: run(arch, part), range(PROCESSES)))
    versions = parts[0][0]["versions"]
    lines = [line for part in parts for line in part[1:]]
    assert sorted(line["job"] for line in lines) == sorted(job.name for job in gate.jobs(arch))
    wrong = {line["job"]: line["faults"] for line in lines if line["faults"]}
    assert not wrong, "\n".join(f"{job}: {faults}" for job, faults in wrong.items())
    numbers = {line["job"]: f"{line['registers']} registers, {line['shared']} B" for line in lines}
    name = f"sm_{arch}, {versions}"
    golden = json.loads(GOLDEN.read_text())
    if pytestconfig.getoption("--write-golden"):
        GOLDEN.write_text(json.dumps(golden | {name: numbers}, indent=1, sort_keys=True) + "\n")
    elif name not in golden:
        print(f"golden.json has no entry for {name}: registers were not compared")
    else:
        changed = {
            job: (golden[name].get(job), now)
            for job, now in numbers.items()
            if golden[name].get(job) != now
        }
        assert not changed, f"before and now: {changed}"
        assert set(golden[name]) == set(numbers)


def job(launch):
    return launch_job(90, "attention_forward", launch, "causal", 64, torch.bfloat16)


GOOD = Compiled("attention_forward", 200, 0, 100_000, wgmma=8, mma=0, tma=4, setmaxnreg=0)


@pytest.mark.parametrize(
    ("change", "launch", "sentence"),
    [
        ({"stack": 8}, {}, "spills 8 bytes"),
        ({"shared": 232_449}, {}, "needs 232449 of 232448 bytes"),
        ({"wgmma": 0, "mma": 8}, {}, "has 0 wgmma"),
        ({"tma": 0}, {}, "has 0 TMA loads"),
        ({"tma": 4}, {"TMA": False}, "has 4 TMA loads"),
        ({"setmaxnreg": 2}, {}, "has 2 setmaxnreg"),
        ({}, {"WARP_SPECIALIZE": True}, "has 0 setmaxnreg"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_gate_refuses(change, launch, sentence):
    good = Launch(128, 64, 8, 3, TMA=True)
    assert faults(90, job(good), GOOD) == []
    launch = Launch(**(good.__dict__ | launch))
    found = faults(90, job(launch), Compiled(**(GOOD.__dict__ | change)))
    assert len(found) == 1
    assert found[0].startswith(sentence)


def test_a_launch_that_spills_is_refused():
    """128 rows in four warps hold more than 255 registers each."""
    code = (
        "import torch\n"
        "from llmos_fast.kernels import offline\n"
        "from llmos_fast.kernels.attention_jobs import launch_job\n"
        "from llmos_fast.kernels.launch import Launch\n"
        "launch = Launch(128, 128, 4, 2, TMA=True)\n"
        "job = launch_job(90, 'attention_forward', launch, 'causal', 128, torch.bfloat16)\n"
        "code = offline.compiled(90, job.kernel, job.run)\n"
        "print(offline.faults(90, job, code))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "spills" in result.stdout


@pytest.mark.skipif(not offline.runtime.INTERPRETED, reason="this process compiles")
def test_the_interpreter_compiles_nothing():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        offline.compiled(90, "attention_forward", lambda: None)
