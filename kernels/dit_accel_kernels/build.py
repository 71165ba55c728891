"""Compiles the C++ kernels at first use and keeps the libraries in a cache; plain C interface, so no torch headers."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from dit_accel_kernels.errors import KernelUnavailableError

SOURCE = Path(__file__).parent / "csrc" / "block_sparse_attention.cpp"
VQ_SOURCE = SOURCE.with_name("vq_linear.cpp")
# Not -ffast-math: NaN and infinity keep their meaning. The rest only lets multiply and add fuse and drops errno.
NATIVE = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
FLAGS = ("-O3", NATIVE, "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
FLAGS += ("-std=c++17", "-shared", "-fPIC", "-pthread")
COMPILERS = ("c++", "g++", "clang++")


def cache_folder() -> Path:
    """Where compiled kernels are kept: $DIT_ACCEL_CACHE/kernels, else ~/.cache/dit_accel/kernels."""
    root = os.environ.get("DIT_ACCEL_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "dit_accel") / "kernels"


def find_compiler() -> list[str]:
    """The command of the C++ compiler: $CXX if it is set, else the first of `COMPILERS`."""
    given = os.environ.get("CXX")
    if given:
        command = shlex.split(given)
        if shutil.which(command[0]) is None:
            raise KernelUnavailableError(f"no compiler $CXX={given!r} on this machine")
        return command
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise KernelUnavailableError("no C++ compiler (install g++ or clang++, or set CXX)")


def cpu_features() -> str:
    """The processor and what it can do, so that a cache that machines share never hands out a build for another one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    first = {line.split(":")[0].strip(): line for line in reversed(lines) if line.split(":")[0].strip() in wanted}
    return "\n".join([platform.machine(), *(first[name] for name in sorted(first))])


def cache_key(source: bytes, compiler: list[str], version: str) -> str:
    """Name of a build: a hash of everything that decides what is in it."""
    parts = [source, *(x.encode() for x in (*FLAGS, *compiler, version, cpu_features()))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def library_path(source: Path = SOURCE) -> Path:
    """The compiled library of `source`; compiles it where the cache has none: 4 to 10 seconds, once a machine."""
    compiler = find_compiler()
    version = call([*compiler, "--version"]).stdout
    content = b"\0".join(file.read_bytes() for file in (source, *sorted(SOURCE.parent.glob("*.h"))))
    path = cache_folder() / f"{source.stem}-{cache_key(content, compiler, version)}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
            built = Path(folder) / path.name
            call([*compiler, *FLAGS, f"-I{SOURCE.parent}", str(source), "-o", str(built)])
            os.replace(built, path)  # in one step: two processes that compile at once both end with a whole file
    except OSError as error:
        raise KernelUnavailableError(f"the cache folder {path.parent} cannot be written ({error})") from error
    return path


def call(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the compiler; a failure says the command and the first line of what it printed that names an error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelUnavailableError(f"the compiler did not run ({error})") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        told = next((line for line in lines if "error" in line.lower()), lines[0])
        raise KernelUnavailableError(f"`{shlex.join(command)}` failed: {told}")
    return done


@functools.cache
def load(source: Path = SOURCE) -> ctypes.CDLL | str:
    """The loaded library of `source`, or in words why there is none; found out once per process.

    ctypes calls release the GIL.
    """
    try:
        return ctypes.CDLL(str(library_path(source)))
    except (KernelUnavailableError, OSError) as error:
        return str(error)
