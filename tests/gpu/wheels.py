"""What run.sh's parts import beside torch and Triton, and where it comes from when it is missing: a folder of wheels.

python3 tests/gpu/wheels.py --into .gpu/site kernels benchmark     (the folder is $WHEELS)
python3 tests/gpu/wheels.py --list [PART...]                       (the names, for pip download)
python3 tests/gpu/wheels.py --split WHEEL, --join                  (a wheel in parts: archives.py)
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import archives

# Package by the module that is imported. Installed without their dependencies, which are named too.
PYTEST = {
    "pytest": "pytest", "pytest_timeout": "pytest-timeout", "iniconfig": "iniconfig", "pluggy": "pluggy",
    "packaging": "packaging", "pygments": "pygments",
}  # fmt: skip
BENCHMARK = {
    "numpy": "numpy", "yaml": "pyyaml", "tqdm": "tqdm", "matplotlib": "matplotlib", "contourpy": "contourpy",
    "cycler": "cycler", "fontTools": "fonttools", "kiwisolver": "kiwisolver", "packaging": "packaging",
    "PIL": "pillow", "pyparsing": "pyparsing", "dateutil": "python-dateutil", "six": "six",
}  # fmt: skip
MEGATRON = {
    "megatron.core": "megatron-core", "numpy": "numpy", "einops": "einops", "psutil": "psutil", "yaml": "pyyaml",
    "tqdm": "tqdm", "packaging": "packaging", "typing_extensions": "typing-extensions",
}  # fmt: skip
# What Transformer Engine imports; its own packages are te_engine.py's.
ENGINE = {
    "pydantic": "pydantic", "pydantic_core": "pydantic-core", "annotated_types": "annotated-types",
    "typing_inspection": "typing-inspection", "typing_extensions": "typing-extensions", "onnx": "onnx",
    "onnxscript": "onnxscript", "onnx_ir": "onnx-ir", "ml_dtypes": "ml-dtypes", "google.protobuf": "protobuf",
    "nvdlfw_inspect": "nvdlfw-inspect", "einops": "einops", "packaging": "packaging", "yaml": "pyyaml",
}  # fmt: skip
# A part of run.sh: what it imports; te-build: what the source of Transformer Engine's torch part is built with.
NEEDS = {
    "kernels": {**PYTEST, **BENCHMARK},
    "training": {**PYTEST, **MEGATRON},
    "benchmark": BENCHMARK,
    "te-values": {**PYTEST, **BENCHMARK},
    "te-bandwidth": {**BENCHMARK, **ENGINE},
    "te-bits": {**PYTEST, **MEGATRON, **ENGINE},
    "te-mlp": {**MEGATRON, **BENCHMARK, **ENGINE},
    "te-build": {"setuptools": "setuptools", "wheel": "wheel", "ninja": "ninja", "packaging": "packaging"},
}
ENGINE_VERSION = "2.20.2"  # where the protocol of its quantizers was read
ENGINE_CORES = {"12": "transformer-engine-cu12", "13": "transformer-engine-cu13"}  # by the major of torch's CUDA
VERSIONS = {
    "megatron-core": "==0.19.2",  # setup.py's; 0.20 may move what we hook into
    "pydantic": "==2.14.4",  # takes one version of its core
    "pydantic-core": "==2.50.5",
    **dict.fromkeys(["transformer-engine", *ENGINE_CORES.values()], f"=={ENGINE_VERSION}"),
}
BUILD = {"setuptools": "setuptools", "pybind11": "pybind11", "packaging": "packaging"}  # a source package's needs


def is_there(module: str) -> bool:
    """Whether python3 could import it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def missing(parts: list[str]) -> list[str]:
    """The packages that the parts need and python3 lacks."""
    wanted = {module: package for part in parts for module, package in NEEDS[part].items()}
    return sorted({package for module, package in wanted.items() if not is_there(module)})


def in_folder(folder: Path, package: str) -> list[Path]:
    """Its wheels in the folder, else its source packages."""
    files = files_of(folder, package)
    return [path for path in files if path.suffix == ".whl"] or files


def files_of(folder: Path, package: str) -> list[Path]:
    """Its wheels and source packages in the folder."""
    name = re.sub("[-_.]+", "[-_.]+", package)
    files = [path for path in sorted(folder.iterdir()) if re.match(rf"{name}-\d", path.name, re.IGNORECASE)]
    return [path for path in files if path.name.endswith((".whl", ".tar.gz", ".zip"))]


def plan(parts: list[str], folder: Path | None) -> list[str]:
    """The packages to install from ``folder``.

    Raises:
        LookupError: with the one line that a person needs.
    """
    packages = missing(parts)
    if not packages:
        return []
    folder = checked(folder, packages)
    if any(is_source(in_folder(folder, package)) for package in packages):
        packages += [package for module, package in BUILD.items() if package not in packages and not is_there(module)]
    if absent := [package for package in packages if not in_folder(folder, package)]:
        raise LookupError(f"WHEELS: expected wheels of {', '.join(absent)} in {folder}, got none: add them")
    return packages


def given_folder() -> Path | None:
    """$WHEELS, None where it is not set."""
    return Path(os.environ["WHEELS"]) if os.environ.get("WHEELS") else None


def checked(folder: Path | None, wanted: list[str]) -> Path:
    """``folder``, from which ``wanted`` will be taken.

    Raises:
        LookupError: it is none.
    """
    if folder is None:
        raise LookupError(f"expected {', '.join(wanted)} in python3, got none: set WHEELS to a folder with wheels")
    if not folder.is_dir():
        raise LookupError(f"WHEELS: expected a folder, got {folder}: make it as --help says")
    return folder


def provide(parts: list[str], folder: Path | None, into: Path) -> None:
    """Installs into ``into`` what the parts import and python3 lacks.

    Raises:
        LookupError: with the one line that a person needs.
    """
    packages = plan(parts, folder)
    into.mkdir(parents=True, exist_ok=True)
    if packages and folder:
        install(packages, folder, into)


def is_source(files: list[Path]) -> bool:
    """Whether there is a package, but no wheel."""
    return bool(files) and files[0].suffix != ".whl"


def install(packages: list[str], folder: Path, into: Path) -> None:
    """Puts them into ``into``; build tools first, for a source package is built with what is there."""
    tools = [package for package in packages if package in BUILD.values()]
    for group in (tools, [package for package in packages if package not in tools]):
        if group:
            pip(group, folder, into)


def pip(packages: list[str], folder: Path, into: Path) -> None:
    """Installs from the folder only.

    Raises:
        LookupError: pip's own last line.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    command += ["--no-index", "--find-links", str(folder), "--no-deps", "--no-build-isolation"]
    command += ["--ignore-requires-python"]  # Megatron's metadata ask for 3.12; it runs on 3.11
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(into), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, "--target", str(into), *packages], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(("[", "WARNING"))]
        why = lines[-1] if lines else "no reason given"
        raise LookupError(f"WHEELS: pip cannot install {', '.join(packages)}: {why}")


def names(parts: list[str], cuda: str) -> list[str]:
    """Everything that the parts may need, in the versions that must be; Transformer Engine's torch part is no wheel."""
    found = {package for part in parts for package in NEEDS[part].values()}
    if any(NEEDS[part].keys() >= ENGINE.keys() for part in parts):
        found |= {"transformer-engine", ENGINE_CORES[cuda]}
    return [name + VERSIONS.get(name, "") for name in sorted(found)]


def arguments() -> argparse.Namespace:
    """The command line's."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(NEEDS)}")
    parse.add_argument("--into", type=Path, default=Path(".gpu/site"), metavar="DIR", help="default: .gpu/site")
    parse.add_argument("--list", action="store_true", help="print the names of all packages and end")
    parse.add_argument("--cuda", choices=ENGINE_CORES, default="13", help="torch's CUDA, for --list (default: 13)")
    parse.add_argument("--split", type=Path, metavar="WHEEL", help="write its parts beside it")
    parse.add_argument("--part-mib", type=int, default=archives.PART_MIB, metavar="N", help="of --split (default: 48)")
    parse.add_argument("--join", action="store_true", help="keep the parts in $WHEELS, join them when all are there")
    return parse.parse_args()


def run(args: argparse.Namespace) -> None:
    """One of the four commands.

    Raises:
        LookupError: with the one line that a person needs.
    """
    if args.list:
        print(*names(args.parts or list(NEEDS), args.cuda))
    elif args.split:
        print(*archives.split(args.split, args.part_mib << 20), sep="\n")
    elif args.join:
        for path in archives.join_all(checked(given_folder(), ["parts of wheels"]), archives.CACHE):
            print(path)
    else:
        provide(args.parts, given_folder(), args.into)


def main() -> int:
    """Entry point; 2 with one line on standard error where something is missing."""
    args = arguments()
    args.into = args.into.resolve()  # pip builds elsewhere
    sys.path.insert(0, str(args.into))  # what an earlier run has put there
    try:
        run(args)
    except LookupError as error:
        print(f"tests/gpu/run.sh: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
