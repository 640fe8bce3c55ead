"""Builds transformer-engine-torch, which is published as source only: C++ that needs CUDA's headers, no nvcc, no GPU.

Its wheel has torch's version in its name (te_engine.py), so it may be built anywhere with the same torch and Python:
`WHEELS=dir python3 tests/gpu/te_engine.py build` prints its path, and in another WHEELS folder it is taken as it is.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# Each for what torch's headers and the extension include; the wheels that torch depends on lack crt and nv.
HEADERS = (
    "cuda_runtime_api.h", "crt/host_config.h", "nv/target", "nvtx3/nvToolsExt.h", "cublas_v2.h", "cusparse.h",
    "cusolverDn.h", "cudnn.h", "nccl.h",
)  # fmt: skip
JOB_GIB = 2  # a compiler needs 1.5 GiB for the largest file
COMPILER = os.environ.get("CXX", "c++")


def include_folders(cuda: str) -> list[Path]:
    """Folders of headers for this CUDA version's major: a toolkit's first, then those of the nvidia wheels."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parents[1] if nvcc else None, "/usr/local/cuda"]
    nvidia = find_spec("nvidia")
    roots = [Path(root) for root in (nvidia.submodule_search_locations or [])] if nvidia else []
    found = [Path(home) / "include" for home in homes if home]
    found += [path for root in roots for path in sorted(root.glob("*/include"))]
    usable = [path for path in dict.fromkeys(found) if path.is_dir() and _major(path) in (None, cuda.split(".")[0])]
    return [each for path in usable for each in (path, path / "cccl") if each.is_dir()]


def check(cuda: str) -> None:
    """Raises LookupError with one line where the build could not work."""
    if shutil.which(COMPILER) is None:
        raise LookupError(f"te: expected the C++ compiler {COMPILER} on PATH, got none: install one or set CXX")
    folders = include_folders(cuda)
    absent = [header for header in HEADERS if not any((folder / header).exists() for folder in folders)]
    if absent:
        raise LookupError(
            f"te: expected the headers {', '.join(absent)} for CUDA {cuda}, got none in {len(folders)} folders: set "
            "CUDA_HOME to a toolkit, or add a wheel that was built elsewhere (--help)"
        )


def environment(cuda: str, site: Path) -> dict[str, str]:
    """What the package's setup.py reads, and the compiler's include path."""
    folders = include_folders(cuda)
    toolkit = next((path.parent for path in folders if (path / "cuda.h").exists() and _nvcc(path).exists()), None)
    return {
        **os.environ,
        "NVTE_PYTORCH_FORCE_BUILD": "TRUE",  # or it first asks the network for a wheel
        "NVTE_NO_LOCAL_VERSION": "1",  # or it may add the commit of a checkout around the temporary folder
        "NVTE_FRAMEWORK": "pytorch",
        "NVTE_BUILD_USE_NVIDIA_WHEELS": "0" if toolkit else "1",
        "CUDA_HOME": str(toolkit or ""),
        "CPLUS_INCLUDE_PATH": os.pathsep.join(map(str, folders)),  # it looks in one place only
        "MAX_JOBS": str(jobs()),
        "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(site / "bin"), os.environ["PATH"]]),  # ninja
    }


def jobs() -> int:
    """Compilers at a time: one a core, as far as the memory goes."""
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    return max(1, min(len(os.sched_getaffinity(0)), int(found[1]) // 2**20 // JOB_GIB if found else 1))


def build(source: Path, wheel: Path, environ: dict[str, str]) -> Path:
    """Makes ``wheel``, which appears when it is complete; pip's output goes where ours does.

    Raises:
        LookupError: it cannot be built.
    """
    folder = wheel.parent / "building"
    shutil.rmtree(folder, ignore_errors=True)  # of a build that was ended
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--wheel-dir", str(folder), str(source)], env=environ, check=False)
    made = list(folder.glob("*.whl"))
    if done.returncode or len(made) != 1:
        raise LookupError(f"te: pip cannot build {source.name} (exit code {done.returncode}): its output says why")
    made[0].replace(wheel)
    folder.rmdir()
    return wheel


def _major(include: Path) -> str | None:
    """Of the CUDA version whose headers these are; None where they are not CUDA's own."""
    path = include / "cuda.h"
    found = re.search(r"#define CUDA_VERSION (\d+)", path.read_text(errors="ignore")) if path.exists() else None
    return str(int(found[1]) // 1000) if found else None


def _nvcc(include: Path) -> Path:
    return include.parent / "bin" / "nvcc"
