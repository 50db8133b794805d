"""What nvcc made of the CUDA kernels: no warnings, no spills, and the instructions that are meant.

Looks into the extension that is installed, whatever architectures it was built for.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORMATS = {"int8": 0, "int4": 1, "int4_asym": 2, "nf4": 3}
TYPES = {"bf16": 1, "fp16": 2}
X_TILES = (1, 2, 4, 8)
INSTRUCTION = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@\S+\s+)?(\w[\w.]*)\s*([^;]*?)\s*;")
OPERATION = re.compile(r"\*/\s+(?:@\S+\s+)?(\w[\w.]*)")
# rows of warps, tiles of x for each; Hopper's warpgroups have the last one
TILES = {(1, x) for x in X_TILES} | {(2, 8), (1, 16)}
WARPGROUPS = 16
NAME = re.compile(r"quant_matmul_kernel\w*?WeightFormatE(\d)ELN\w*?FloatTypeE(\d)ELj(\d)ELj(\d+)E")
KERNELS = {(f, t, *tile) for f in FORMATS.values() for t in TYPES.values() for tile in TILES}
INTEGER_NAME = re.compile(r"integer_matmul_kernel\w*?WeightFormatE(\d)ELj(\d)ELj(\d+)E")
INTEGER_KERNELS = {(FORMATS[f], 1, x) for f in ("int8", "int4", "int4_asym") for x in X_TILES}
INTEGER_KERNELS |= {(FORMATS["int8"], 2, 8), (FORMATS["int8"], 1, WARPGROUPS)}
ROUNDING_NAME = re.compile(r"round_rows_kernel\w*?FloatTypeE(\d)E")
REGISTERS, THREADS = 65536, 256


def tool(name):
    """A program of the CUDA toolkit, or of Triton's package, which has some of them."""
    spec = importlib.util.find_spec("triton")
    folders = [os.environ["PATH"], "/usr/local/cuda/bin"]
    folders += [f"{folder}/backends/nvidia/bin" for folder in spec.submodule_search_locations]
    path = shutil.which(name, path=os.pathsep.join(folders))
    return path or pytest.skip(f"NOT TESTED: {name} is not installed")


@pytest.fixture(scope="module")
def extension():
    spec = importlib.util.find_spec("llmos_fast._CUDA")
    if spec is None:
        pytest.skip("NOT TESTED: the CUDA extension was not built")
    return spec.origin


def cuobjdump(option, extension):
    """Its output by architecture: {"sm_80": lines, ...}."""
    folder = os.path.dirname(tool("nvdisasm"))  # which it calls
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = [tool("cuobjdump"), option, extension]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    by_architecture, lines = {}, []
    for line in result.stdout.splitlines():
        if (found := re.match(r"arch = (sm_\w+)", line)) is not None:
            lines = by_architecture.setdefault(found[1], [])
        lines.append(line)
    return by_architecture


def kernel_of(line, name=NAME):
    """The numbers of ``name`` where ``line`` begins such a kernel."""
    found = name.search(line)
    return None if found is None else tuple(int(number) for number in found.groups())


def architectures(found):
    """Those of the kernels; the linker adds an empty one of its own."""
    return {name: lines for name, lines in found.items() if any(map(NAME.search, lines))}


def most_registers(warps, tiles):
    """Of a thread; two blocks share an SM for up to 16 rows: kBlocks of product_tile.cuh."""
    blocks = 2 if warps * tiles <= 2 else 1
    return min(255, REGISTERS // THREADS // blocks)


def test_no_kernel_spills_and_registers_suffice(extension):
    found = architectures(cuobjdump("-res-usage", extension))
    assert found
    for architecture, lines in found.items():
        kernels, integer_kernels = set(), set()
        for name, line in pairwise(lines):
            if "Function " not in name:
                continue
            where = f"{architecture} {name}"
            numbers = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
            assert numbers["STACK"] == numbers["LOCAL"] == 0, where
            if (kernel := kernel_of(name)) is not None:
                assert numbers["REG"] <= most_registers(*kernel[2:]), where
                kernels.add(kernel)
            if (kernel := kernel_of(name, INTEGER_NAME)) is not None:
                assert numbers["REG"] <= most_registers(*kernel[1:]), where
                integer_kernels.add(kernel)
        assert kernels == KERNELS, architecture
        assert integer_kernels == INTEGER_KERNELS, architecture


@pytest.fixture(scope="module")
def sass(extension):
    """Its lines by architecture."""
    found = architectures(cuobjdump("-sass", extension))
    assert found
    return found


def counts_of(lines, kernel_name):
    """The operations of every kernel of that name, counted."""
    counts, kernel = {}, None
    for line in lines:
        if "Function :" in line:
            kernel = kernel_of(line, kernel_name)
        elif kernel is not None and (operation := OPERATION.search(line)):
            counts.setdefault(kernel, Counter())[operation[1]] += 1
    return counts


def copies_are_wide(count, least):
    copies = sum(n for name, n in count.items() if name.startswith("LDGSTS."))
    wide = sum(n for name, n in count.items() if re.match(r"LDGSTS\.\S*\b128", name))
    return copies == wide >= least


def uses_no_local_memory(count):
    return not any(name.startswith(("LDL", "STL")) for name in count)


def test_the_instructions_that_are_meant(sass):
    for architecture, lines in sass.items():
        counts = counts_of(lines, NAME)
        assert set(counts) == KERNELS, architecture
        for (weights, dtype, pairs, tiles), count in counts.items():
            where = (architecture, weights, dtype, pairs, tiles)
            if tiles == WARPGROUPS:
                continue
            product = "HMMA.16816.F32.BF16" if dtype == TYPES["bf16"] else "HMMA.16816.F32"
            # 4 steps of a stage, a loop where weights are scaled before they are multiplied; two
            # products of 16 rows by two halves of a step's k
            steps = 1 if pairs > 1 and weights != FORMATS["int8"] else 4
            assert count[product] == steps * 4 * pairs * tiles, where
            loads = 8 if weights == FORMATS["int8"] else 4
            assert copies_are_wide(count, loads), where
            # a lane's weights and its x: one load of 16 bytes each
            assert count["LDS.128"] >= steps * (loads // 4 * pairs + tiles), where
            assert uses_no_local_memory(count), where


def test_integer_products(sass):
    for architecture, lines in sass.items():
        counts = counts_of(lines, INTEGER_NAME)
        assert set(counts) == INTEGER_KERNELS, architecture
        for (weights, pairs, tiles), count in counts.items():
            where = (architecture, weights, pairs, tiles)
            if tiles == WARPGROUPS:
                continue
            # 4 steps of a stage, two products of 16 rows for a pair of panels
            assert count["IMMA.16832.S8.S8"] == 4 * 2 * pairs * tiles, where
            loads = 8 if weights == FORMATS["int8"] else 4
            assert copies_are_wide(count, loads), where
            assert count["LDS.128"] >= loads * pairs, where
            assert count["LDS"] >= 4 * 2 * tiles, where
            # the epilogue is a loop
            assert sum(count.values()) < 4000, where
            assert uses_no_local_memory(count), where


def instructions_of(lines, kernel_name):
    """(address, operation, operands) of every such kernel of warpgroups."""
    found, kernel = {}, None
    for line in lines:
        if "Function :" in line:
            kernel = kernel_of(line, kernel_name)
        elif kernel is not None and kernel[-1] == WARPGROUPS and (i := INSTRUCTION.search(line)):
            found.setdefault(kernel, []).append((int(i[1], 16), i[2], i[3]))
    return found


def registers(operand, count):
    first = re.match(r"R(\d+)", operand)
    return set() if first is None else set(range(int(first[1]), int(first[1]) + count))


def registers_written(operation, operands):
    if operation.startswith(("ST", "RED", "BAR")):
        return set()
    wide = 4 if ".128" in operation else 2 if re.search(r"\.(64|WIDE)", operation) else 1
    return registers(operands, wide)


def early_writes(instructions):
    """Those that write a left operand's registers before its product has been waited for.

    Loops with products are gone through twice.
    """
    at = {address: i for i, (address, _, _) in enumerate(instructions)}
    products = [address for address, operation, _ in instructions if "GMMA." in operation]
    groups, early, again, i = [set()], [], set(), 0
    while i < len(instructions):
        address, operation, operands = instructions[i]
        i += 1
        if "GMMA." in operation:
            groups[-1] |= registers(operands.split(", ")[1], 4)
            if "gsb0" in operands:
                groups.append(set())
        elif operation == "WARPGROUP.DEPBAR.LE":
            pending = int(operands.split(", ")[1], 16)
            groups = groups[len(groups) - pending - 1 :]
        elif registers_written(operation, operands) & set().union(*groups):
            early.append((hex(address), operation, operands))
        elif operation == "BRA":
            target = int(operands.split(", ")[-1], 16)
            if any(target <= product < address for product in products) and address not in again:
                again.add(address)
                i = at[target]
    return early


def test_products_of_warpgroups(sass):
    for architecture, lines in sass.items():
        if architecture != "sm_90a":  # empty ones
            continue
        kernels = instructions_of(lines, NAME)
        assert set(kernels) == {kernel for kernel in KERNELS if kernel[-1] == WARPGROUPS}
        kernels |= instructions_of(lines, INTEGER_NAME)
        for kernel, instructions in kernels.items():
            count = Counter(operation for _, operation, _ in instructions)
            integer = len(kernel) == 3
            # 4 steps of a stage, or the halves of one; two products of 64 rows
            name = "IGMMA.64x128x32.S8.S8" if integer else "HGMMA.64x128x16.F32"
            if not integer and kernel[1] == TYPES["bf16"]:
                name += ".BF16"
            assert count[name] == (8 if integer else 4), kernel
            loads = 8 if kernel[0] == FORMATS["int8"] else 4
            assert copies_are_wide(count, loads), kernel
            assert count["FENCE.VIEW.ASYNC.S"] >= 1, kernel
            assert uses_no_local_memory(count), kernel
            assert early_writes(instructions) == [], kernel


def test_an_early_write_is_found():
    product = "R24, R8, gdesc[UR8], R24, gsb0"
    code = [
        (0, "WARPGROUP.ARRIVE", ""),
        (16, "HGMMA.64x128x16.F32", product),
        (32, "LDS.128", "R4, [R2]"),
        (48, "WARPGROUP.DEPBAR.LE", "gsb0, 0x1"),
        (64, "IMAD.WIDE", "R6, R2, R3, RZ"),
        (80, "HGMMA.64x128x16.F32", product.replace("R8", "R12", 1)),
        (96, "WARPGROUP.DEPBAR.LE", "gsb0, 0x1"),
        (112, "MOV", "R9, RZ"),
        (128, "BRA", "0x10"),
    ]
    assert early_writes(code) == []
    for place, write in [(2, "R5, [R2]"), (4, "R7, R2, R3, RZ"), (7, "R15, RZ")]:
        changed = list(code)
        changed[place] = (*code[place][:2], write)
        assert len(early_writes(changed)) >= 1
    assert len(early_writes([*code[:2], (20, "MOV", "R14, RZ"), *code[2:]])) == 1


def test_rounding(sass):
    for architecture, lines in sass.items():
        counts = counts_of(lines, ROUNDING_NAME)
        assert set(counts) == {(0,), (1,), (2,)}, architecture
        for kernel, count in counts.items():
            # 8 held units, and the loops over longer rows and groups; fp32 has two loads for each
            wide = (8 + 3) * (2 if kernel == (0,) else 1)
            assert count["LDG.E.128"] + count["LDG.E.128.CONSTANT"] == wide, (architecture, kernel)
            assert uses_no_local_memory(count), (architecture, kernel)


def test_no_warnings(tmp_path):
    """Of nvcc's front end and of the host's compiler; ptxas has none that the gate above lacks."""
    nvcc = tool("nvcc")
    flags = "-std=c++17 --ptx -arch=compute_80 --Werror all-warnings -Xcompiler=-Wall,-Werror"

    def compiled(source):
        command = [nvcc, *flags.split(), f"-I{ROOT / 'csrc'}", str(source)]
        command += ["-o", str(tmp_path / f"{source.name}.ptx")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, result in zip(sources, pool.map(compiled, sources), strict=True):
            assert result.returncode == 0, f"{source.name}: {result.stderr[-3000:]}"
