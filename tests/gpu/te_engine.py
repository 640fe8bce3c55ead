"""Transformer Engine for run.sh: three packages of one version, from WHEELS and .gpu/wheels into .gpu/site.

WHEELS=dir python3 tests/gpu/te_engine.py prepare PART...     checks, and installs what else the parts import
WHEELS=dir python3 tests/gpu/te_engine.py build               the torch part's wheel (te_build.py), if there is none
WHEELS=dir python3 tests/gpu/te_engine.py install             all three

transformer-engine (Python) and transformer-engine-cu12 or -cu13 (the library, by torch's CUDA) are wheels;
transformer-engine-torch is a source package. All share the folder transformer_engine, so one call of pip installs them:
a second one would replace it.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import archives
import te_build
import wheels

VERSION = wheels.ENGINE_VERSION
META, TORCH_PART = "transformer-engine", "transformer-engine-torch"
PARTS = {"te-bandwidth", "te-bits", "te-mlp"}  # of run.sh: those that import it
SITE = Path(".gpu/site")


@dataclass(frozen=True)
class Torch:
    """What the packages must match: ``version`` such as 2.11.0+cu130, ``cuda`` such as 13.0, None without CUDA."""

    version: str
    cuda: str | None

    @property
    def core(self) -> str:
        """The library's package.

        Raises:
            LookupError: there is none.
        """
        major = (self.cuda or "").split(".")[0]
        if major not in wheels.ENGINE_CORES:
            expected = f"a torch with CUDA {' or '.join(wheels.ENGINE_CORES)}"
            raise LookupError(f"te: expected {expected}, got {self.cuda or 'one without CUDA'}: take another torch")
        return wheels.ENGINE_CORES[major]

    @property
    def wheel_name(self) -> str:
        """Of the torch part: torch's version is its build tag, in letters that every tool copies."""
        tag = re.sub(r"[^0-9A-Za-z.]", "_", self.version)
        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        machine = os.uname().machine
        return f"transformer_engine_torch-{VERSION}-1torch{tag}-{python}-{python}-linux_{machine}.whl"


def this_torch() -> Torch:
    """python3's."""
    import torch  # seconds

    return Torch(torch.__version__, torch.version.cuda)


def find(folders: list[Path], torch: Torch) -> tuple[Path, Path, Path]:
    """The wheels of the Python and of the library, and the torch part: its wheel for this torch, else its source.

    Raises:
        LookupError: with the one line that a person needs.
    """
    built = [folder / torch.wheel_name for folder in folders]
    found = {
        META: _of_version(folders, META, ".whl"),
        torch.core: _of_version(folders, torch.core, ".whl"),
        TORCH_PART: [path for path in built if path.exists()] or _of_version(folders, TORCH_PART, ".tar.gz"),
    }
    if absent := [f"{name}=={VERSION}" for name, paths in found.items() if not paths]:
        others = sorted(path.name for path in folders[0].glob("transformer_engine*"))
        raise LookupError(
            f"WHEELS: expected {', '.join(absent)} for torch {torch.version} in {folders[0]}, "
            f"got {', '.join(others) or 'none'}: add what --help names"
        )
    return found[META][0], found[torch.core][0], found[TORCH_PART][0]


def files(torch: Torch) -> tuple[Path, Path, Path]:
    """`find` in $WHEELS and .gpu/wheels, after joining what came in parts."""
    folder = wheels.checked(wheels.given_folder(), [f"{META}=={VERSION}"])
    archives.join_all(folder, archives.CACHE)
    return find([folder, archives.CACHE], torch)


def installed() -> str | None:
    """The version where all three are there and agree."""
    core = next(filter(None, map(_installed, wheels.ENGINE_CORES.values())), None)
    found = {_installed(META), core, _installed(TORCH_PART)}
    return found.pop() if len(found) == 1 else None


def prepare(parts: list[str]) -> None:
    """Raises LookupError with one line where something is missing; then nothing was installed."""
    needs = list(parts)
    if PARTS & set(parts) and not installed():
        torch = this_torch()
        if wheels.is_source([files(torch)[2]]):
            te_build.check(str(torch.cuda))
            needs.append("te-build")
    wheels.provide(needs, wheels.given_folder(), SITE.resolve())


def build() -> None:
    """Prints the torch part's wheel; a new one is copied to $OUT."""
    if installed():
        return
    torch = this_torch()
    path = files(torch)[2]
    if wheels.is_source([path]):
        te_build.check(str(torch.cuda))
        environ = te_build.environment(str(torch.cuda), SITE.resolve())
        path = te_build.build(path, archives.CACHE / torch.wheel_name, environ)
        if os.environ.get("OUT"):
            shutil.copy(path, os.environ["OUT"])
    print(path)


def install() -> None:
    """All three in one call, then an import.

    Raises:
        LookupError: pip's or Python's last line.
    """
    if installed():
        return
    found = files(this_torch())
    if wheels.is_source([found[2]]):
        raise LookupError(f"te: expected a wheel of {TORCH_PART}, got its source only: .gpu/te-build.log says why")
    wheels.pip([str(path.resolve()) for path in found], archives.CACHE, SITE.resolve())
    environ = {**os.environ, "NVTE_FRAMEWORK": "pytorch", "PYTHONPATH": str(SITE.resolve())}
    command = [sys.executable, "-c", "import torch, transformer_engine.pytorch"]  # torch brings the CUDA libraries
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LookupError(f"te: installed, but it cannot be imported: {done.stderr.strip().splitlines()[-1]}")


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _of_version(folders: list[Path], package: str, suffix: str) -> list[Path]:
    files = [path for folder in folders if folder.is_dir() for path in wheels.files_of(folder, package)]
    return [
        path for path in files if re.search(rf"-{re.escape(VERSION)}[-.]", path.name) and path.name.endswith(suffix)
    ]


def main() -> int:
    """Entry point; 2 with one line on standard error where something is missing."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("action", choices=["prepare", "build", "install"])
    parse.add_argument("parts", nargs="*", metavar="PART", help="of run.sh, for prepare")
    args = parse.parse_args()
    sys.path.insert(0, str(SITE.resolve()))  # what an earlier run has put there
    try:
        if args.action == "prepare":
            prepare(args.parts)
        else:
            (build if args.action == "build" else install)()
    except LookupError as error:
        print(f"tests/gpu/run.sh: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
