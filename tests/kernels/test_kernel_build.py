"""Compiling the C++ kernel: what names a build, two at once, what goes wrong, and other instruction sets."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dit_accel_kernels import BlockMask, KernelUnavailableError, block_sparse_attention, build

compiled = pytest.mark.skipif(isinstance(build.load(), str), reason=f"no CPU kernel: {build.load()}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; gives the folder that compiled kernels go to."""
    monkeypatch.setenv("DIT_ACCEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A kernel that compiles at once."""
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_ACCEL_CACHE", "/some/where")
    assert build.cache_folder() == Path("/some/where/kernels")
    monkeypatch.delenv("DIT_ACCEL_CACHE")
    assert build.cache_folder() == Path.home() / ".cache" / "dit_accel" / "kernels"


def test_everything_that_decides_a_build_is_in_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.cache_key(b"source", ["c++"], "12.2")
    assert first == build.cache_key(b"source", ["c++"], "12.2")
    keys = {first, build.cache_key(b"source ", ["c++"], "12.2")}
    keys |= {build.cache_key(b"source", ["g++"], "12.2"), build.cache_key(b"source", ["c++"], "12.3")}
    monkeypatch.setattr(build, "cpu_features", lambda: "another processor")
    keys.add(build.cache_key(b"source", ["c++"], "12.2"))
    monkeypatch.setattr(build, "FLAGS", ("-O0",))
    keys.add(build.cache_key(b"source", ["c++"], "12.2"))
    assert len(keys) == 6


def test_cpu_features_name_the_processor() -> None:
    told = build.cpu_features()
    assert platform.machine() in told
    if platform.machine() == "x86_64" and Path("/proc/cpuinfo").exists():
        assert " sse2 " in told


@compiled
def test_a_build_is_made_once_and_anew_for_another_source(cache: Path, source: Path) -> None:
    first = build.library_path(source)
    made = first.stat().st_mtime_ns
    assert build.library_path(source) == first
    assert first.stat().st_mtime_ns == made
    assert ctypes.CDLL(str(first)).answer() == 42
    source.write_text('extern "C" int answer() { return 43; }\n')
    second = build.library_path(source)
    assert ctypes.CDLL(str(second)).answer() == 43
    assert sorted(cache.iterdir()) == sorted([first, second])  # no temporary folder is left


@compiled
def test_two_processes_compile_at_once(cache: Path, source: Path) -> None:
    """Both start from the empty cache, and both must end with a whole library."""
    code = (
        "import ctypes, sys; from pathlib import Path; from dit_accel_kernels import build; "
        "print('ready', flush=True); sys.stdin.read(1); "
        "print(ctypes.CDLL(str(build.library_path(Path(sys.argv[1])))).answer())"
    )
    command = [sys.executable, "-c", code, str(source)]
    pipe = subprocess.PIPE
    runs = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
    for run in runs:
        run.stdin.write("x")
        run.stdin.flush()
    assert [run.communicate()[0] for run in runs] == ["42\n"] * 2
    assert len(list(cache.iterdir())) == 1


@compiled
@pytest.mark.usefixtures("cache")
def test_a_source_that_does_not_compile(source: Path) -> None:
    source.write_text("int answer() { return forty_two; }\n")
    with pytest.raises(KernelUnavailableError, match=r"failed: .*forty_two"):
        build.library_path(source)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(KernelUnavailableError, match=r"install g\+\+ or clang\+\+"):
        build.library_path(source)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(KernelUnavailableError, match="no-such-compiler"):
        build.library_path(source)


@compiled
def test_cxx_is_taken_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    command = build.find_compiler()
    monkeypatch.setenv("CXX", f"{command[0]} -g0")
    assert build.find_compiler() == [command[0], "-g0"]


@compiled
def test_a_cache_that_cannot_be_written(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_ACCEL_CACHE", str(source))  # a file, not a folder
    with pytest.raises(KernelUnavailableError, match="cannot be written"):
        build.library_path(source)


def test_load_says_why_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = build.load.__wrapped__()
    assert isinstance(reason, str)
    assert "no-such-compiler" in reason


@compiled
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("wide", [False, True])
def test_other_instruction_sets(wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrow branch for plain x86-64, and the wide one of AVX-512, which any compiler splits into what there is."""
    text = build.SOURCE.read_text()
    source = tmp_path / "block_sparse_attention.cpp"
    source.write_text(text.replace("#if defined(__AVX512F__)", "#if 1") if wide else text)
    flags = ["-O1", *build.FLAGS[1:]] if wide else ["-march=x86-64" if "native" in x else x for x in build.FLAGS]
    monkeypatch.setattr(build, "FLAGS", tuple(flags))
    library = ctypes.CDLL(str(build.library_path(source)))
    monkeypatch.setattr(build, "load", lambda: library)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, tokens, 40) for tokens in (100, 200, 200))
    mask = BlockMask.from_dense(torch.rand(1, 2, 2, 4) < 0.6)
    bias = torch.randn(1, 200).masked_fill(torch.rand(1, 200) < 0.2, -float("inf"))
    exact = block_sparse_attention(q.double(), k.double(), v.double(), mask, key_bias=bias, impl="reference")
    for dtype, unit in ((torch.float32, 0.0), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
        inputs = (x.to(dtype) for x in (q, k, v))
        out = block_sparse_attention(*inputs, mask, key_bias=bias, impl="cpu")
        torch.testing.assert_close(out.double(), exact, rtol=unit, atol=4e-6 + 2 * unit)  # inputs are rounded as well
