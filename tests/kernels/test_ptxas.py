"""Triton is pointed at the assembler of the extra where that mends something, and only there."""

import os
from types import SimpleNamespace

import pytest
import torch
from llmos_fast.kernels import ptxas
from triton import knobs
from triton.backends.nvidia import compiler

BEFORE = os.environ.get("TRITON_PTXAS_PATH")


def fake_tool(path, version):
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {version}, V{version}.37\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Triton brings 12.8, CUDA is 13, the extra is installed in the second of two folders."""
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    extra = fake_tool(tmp_path / "second" / "cu13" / "bin" / "ptxas", "13.5")
    own = fake_tool(tmp_path / "triton" / "ptxas", "12.8")
    spec = SimpleNamespace(submodule_search_locations=folders)
    monkeypatch.setattr(ptxas.importlib.util, "find_spec", {"nvidia": spec}.get)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    # set, then deleted: monkeypatch then removes what triton writes there, even where none was
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    compiler.get_ptxas_version.cache_clear()
    with knobs.nvidia.scope():
        knobs.nvidia.ptxas = str(own)
        del os.environ["TRITON_PTXAS_PATH"]
        # as triton before 3.9 has it
        monkeypatch.setattr(compiler, "get_ptxas", lambda arch: knobs.nvidia.ptxas)
        yield SimpleNamespace(own=own, extra=extra, spec=spec)
    compiler.get_ptxas_version.cache_clear()
    knobs.NvidiaTool.from_path.cache_clear()


def test_the_extra_is_preferred(machine):
    ptxas.prefer_newer()
    assert compiler.get_ptxas(90).path == str(machine.extra)
    assert ptxas.version() == "13.5.37"
    # processes that this one starts to compile take the same
    assert os.environ["TRITON_PTXAS_PATH"] == str(machine.extra)


def no_cuda(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)


def cuda_12(machine, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")


def variable(machine, monkeypatch):
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(machine.own))


def no_packages(machine, monkeypatch):
    monkeypatch.setattr(ptxas.importlib.util, "find_spec", {}.get)


def no_file(machine, monkeypatch):
    machine.extra.unlink()


def not_executable(machine, monkeypatch):
    machine.extra.chmod(0o644)


def broken(machine, monkeypatch):
    machine.extra.write_text("#!/bin/sh\nexit 1\n")


def too_old(machine, monkeypatch):
    machine.extra.write_text("#!/bin/sh\necho release 13.2, V13.2.1\n")


def good_enough(machine, monkeypatch):
    machine.own.write_text("#!/bin/sh\necho release 13.4, V13.4.59\n")


def compiled_already(machine, monkeypatch):
    compiler.get_ptxas_version(90)


@pytest.mark.parametrize(
    "condition",
    [
        no_cuda,
        cuda_12,
        variable,
        no_packages,
        no_file,
        not_executable,
        broken,
        too_old,
        good_enough,
        compiled_already,
    ],
)
def test_nothing_changes(condition, machine, monkeypatch):
    condition(machine, monkeypatch)
    before = dict(os.environ)
    ptxas.prefer_newer()
    assert knobs.nvidia.ptxas.path == str(machine.own)
    assert dict(os.environ) == before


def test_the_environment_is_as_it_was():
    """A tool of the tests above would assemble nothing for the tests below."""
    assert os.environ.get("TRITON_PTXAS_PATH") == BEFORE


def test_version_of_a_mock(monkeypatch):
    monkeypatch.setattr(compiler, "get_ptxas_version", lambda arch: "mock\n")
    assert ptxas.version() == "mock"
