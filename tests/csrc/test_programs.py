"""The C++ test programs: with sanitizers on this machine, and for ARM under an emulator."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    *sorted((ROOT / "csrc/cpu").glob("quant_*.cpp")),
    ROOT / "csrc/cpu/dispatch.cpp",
    Path(__file__).with_name("test_quant_matmul.cpp"),
]
# the warnings and the floating-point flags of setup.py; little optimisation, to compile fast
FLAGS = "-std=c++17 -fopenmp -Wall -Werror -Wno-psabi -Wno-maybe-uninitialized"
FLAGS += " -fno-math-errno -fno-trapping-math"
# with sanitizers gcc 12 finds its own intrinsics headers wanting once more
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover -Wno-uninitialized"


def output_of(command: list[str], **environment: str) -> str:
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-5000:]}"
    return result.stdout


def need(program: str) -> str:
    return shutil.which(program) or pytest.skip(f"NOT TESTED: {program} is not installed")


def build(compiler: str, flags: str, folder: Path) -> str:
    command = [need(compiler), *FLAGS.split(), *flags.split()]

    def compiled(source: Path) -> str:
        target = str(folder / f"{source.name}.o")
        output_of([*command, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, SOURCES))
    output_of([*command, *objects, "-o", str(folder / "program")])
    return str(folder / "program")


def test_with_sanitizers(tmp_path):
    program = build(os.environ.get("CXX", "g++"), f"-Og -g1 {SANITIZERS}", tmp_path)
    # leaks: not found under a debugger or in many containers, and none of them is ours to find
    output = output_of([program], ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1")
    assert ", 0 failed" in output


@pytest.fixture(scope="module")
def arm_program(tmp_path_factory):
    need("qemu-aarch64")
    return build("aarch64-linux-gnu-g++", "-O1 -static", tmp_path_factory.mktemp("arm"))


@pytest.mark.parametrize(
    ("cpu", "sets"),
    [
        ("max", "neon_i8mm neon_dotprod generic"),
        ("neoverse-n1", "neon_dotprod generic"),
        ("cortex-a57", "generic"),
    ],
)
def test_on_arm(arm_program, cpu, sets):
    output = output_of(["qemu-aarch64", "-cpu", cpu, arm_program])
    assert output.startswith(f"sets: {sets}\n")
    assert ", 0 failed" in output


@pytest.mark.parametrize("name", ["quant_matmul", "integer_matmul", "round_rows", "dequantize"])
def test_cuda_kernels_on_a_simulated_gpu(name, tmp_path):
    """The kernels' own source, with the instructions of tests/csrc/simt."""
    folder, program = Path(__file__).parent, str(tmp_path / "program")
    source = folder / f"test_cuda_{name}.cpp"
    includes = [f"-I{path}" for path in (folder / "simt", folder, ROOT / "csrc")]
    compiler = need(os.environ.get("CXX", "g++"))
    flags = f"{FLAGS} -Wno-unknown-pragmas -O1 -g1 {SANITIZERS}".split()
    output_of([compiler, *flags, *includes, str(source), "-o", program])
    # it does not follow the stacks of fibers, and warns about them
    output = output_of([program], ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0")
    assert ", 0 failed" in output
