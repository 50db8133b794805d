"""Compile csrc/ with ninja: ``llmos_fast._C``, and ``llmos_fast._CUDA`` where nvcc is found.

No torch is needed: the sources include no torch header, so one build serves every torch version.
LLMOS_FAST_CUDA=0 skips the CUDA part. Without a C++ compiler the package installs all the same
and runs on its PyTorch reference.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -Wall -Wno-psabi"
CXX_FLAGS += " -fno-math-errno -fno-trapping-math"  # or the compiler keeps scalar code for errno
# gcc 12's own intrinsics headers trip over it (gcc bug 105593)
CXX_FLAGS += " -Wno-maybe-uninitialized " + os.environ.get("CXXFLAGS", "")
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden -cudart=static"
# PTX is what newer GPUs compile when they load it; that of 9.0a would serve Hopper alone.
DEFAULT_CUDA_ARCHITECTURES = "8.0+PTX 9.0a"


def cuda_architecture_flags() -> str:
    """-gencode flags from TORCH_CUDA_ARCH_LIST ('8.0+PTX;9.0a' or with spaces)."""
    flags = []
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHITECTURES
    for architecture in architectures.replace(";", " ").split():
        number = architecture.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        if number == "90a":  # Hopper's own kernels may be launched
            flags.append("-DLLMOS_FAST_SM_90A")
    return " ".join(flags)


def find_nvcc() -> str | None:
    """Path of nvcc, or None where there is none or LLMOS_FAST_CUDA=0 says not to use it."""
    if os.environ.get("LLMOS_FAST_CUDA") == "0":
        return None
    candidates = [
        shutil.which("nvcc"),
        f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc",
    ]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


class NinjaBuildExt(build_ext):
    """One ninja file for all extensions: objects compile in parallel and only when they changed."""

    def build_extensions(self) -> None:
        """Write build.ninja, run it, and say what was lost where a part does not compile."""
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            print(
                "llmos_fast: no C++ compiler (set CXX, or install g++). The package is installed "
                "without its CPU kernels and will run on the PyTorch reference, slower.",
                file=sys.stderr,
            )
            self.extensions = []  # so that nobody looks for what was not built
            return
        build_folder = Path(self.build_temp).resolve()
        build_folder.mkdir(parents=True, exist_ok=True)
        (build_folder / "build.ninja").write_text(self._ninja_file(compiler))
        environment = {k: v for k, v in os.environ.items() if k != "NINJA_STATUS"}
        for extension in self.extensions:
            target = self._target(extension)
            target.parent.mkdir(parents=True, exist_ok=True)
            command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build_folder), str(target)]
            subprocess.run(command, check=True, env=environment)

    def _target(self, extension: Extension) -> Path:
        return Path(self.get_ext_fullpath(extension.name)).resolve()

    def _ninja_file(self, compiler: str) -> str:
        nvcc = find_nvcc()
        includes = f"-I{ROOT / 'csrc'} -isystem {sysconfig.get_path('include')}"
        includes += f" -isystem {pybind11.get_include()}"
        lines = [
            f"rule cxx\n  command = {compiler} $flags {includes} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
            f"rule nvcc\n  command = {nvcc} $flags {includes} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
            "rule link\n  command = $linker -shared $in -o $out $libraries",
        ]
        for extension in self.extensions:
            cuda = extension.name.endswith("_CUDA")
            objects = []
            for source in extension.sources:
                objects.append(f"{extension.name}/{source}.o")
                rule, flags = "cxx", CXX_FLAGS
                if source.endswith(".cu"):
                    rule, flags = "nvcc", f"{NVCC_FLAGS} {cuda_architecture_flags()}"
                lines.append(f"build {objects[-1]}: {rule} {ROOT / source}\n  flags = {flags}")
            lines.append(f"build {self._target(extension)}: link {' '.join(objects)}")
            linker = f"{nvcc} -cudart=static" if cuda else compiler
            lines.append(f"  linker = {linker}\n  libraries = {'' if cuda else '-fopenmp'}")
        return "\n".join(lines) + "\n"


def sources(*patterns: str) -> list[str]:
    """Source files under csrc/, relative to the root, in a fixed order."""
    found = (path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))
    return sorted(str(path.relative_to(ROOT)) for path in found)


extensions = [Extension("llmos_fast._C", sources("bindings/*.cpp", "cpu/*.cpp"))]
if find_nvcc() and sources("cuda/*.cu"):
    extensions.append(Extension("llmos_fast._CUDA", sources("cuda/*.cpp", "cuda/*.cu")))

setup(
    packages=[*find_packages(include=["llmos_fast", "llmos_fast.*"]), "llmos_fast.kernels"],
    py_modules=["llmos_fast_command"],
    package_data={"llmos_fast": ["py.typed"], "llmos_fast.data": ["wikitext2/*"]},
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuildExt},
)
