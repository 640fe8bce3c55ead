"""Wheels that are too large to be copied at once: cut into parts, laid down by several calls, joined once.

python3 tests/gpu/wheels.py --split NAME.whl [--part-mib 48]     NAME.whl.parts, NAME.whl.part-00, NAME.whl.part-01, ...
WHEELS=dir python3 tests/gpu/wheels.py --join                    keeps what dir has; with the last part joins them

NAME.parts is JSON: ``sha256`` and ``bytes`` of the whole, ``parts`` the sha256 of each part in order. Every call may
find other parts in the folder: they are kept in .gpu/wheels, where the whole appears under its name when it is right.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(".gpu/wheels")
PART_MIB = 48
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Manifest:
    """The content of NAME.parts.

    Attributes:
        name: of the whole file.
        sha256: of the whole.
        bytes: its size.
        parts: sha256 of each part, in order.
    """

    name: str
    sha256: str
    bytes: int
    parts: tuple[str, ...]

    def part(self, index: int) -> str:
        """Name of a part."""
        return f"{self.name}.part-{index:02}"


def split(path: Path, part_bytes: int) -> list[Path]:
    """Writes the parts of ``path`` and, last, its manifest beside it; returns their paths.

    Raises:
        LookupError: no such file, or no such size.
    """
    if not path.is_file() or part_bytes < 1:
        raise LookupError(f"--split: expected a file and parts of 1 MiB or more, got {path} and {part_bytes >> 20} MiB")
    whole = hashlib.sha256()
    parts: list[str] = []
    written: list[Path] = []
    with path.open("rb") as file:
        while block := file.read(part_bytes):
            whole.update(block)
            written.append(path.with_name(f"{path.name}.part-{len(parts):02}"))
            written[-1].write_bytes(block)
            parts.append(hashlib.sha256(block).hexdigest())
    manifest = path.with_name(f"{path.name}.parts")
    content = {"sha256": whole.hexdigest(), "bytes": path.stat().st_size, "parts": parts}
    manifest.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [*written, manifest]


def read(path: Path) -> Manifest:
    """The manifest in ``path``.

    Raises:
        LookupError: it is no manifest.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        parts = tuple(str(part) for part in found["parts"])
        return Manifest(path.name.removesuffix(".parts"), str(found["sha256"]), int(found["bytes"]), parts)
    except (ValueError, KeyError, TypeError):
        raise LookupError(f"{path}: expected a manifest of --split, got something else: copy it again") from None


def join_all(folder: Path, cache: Path) -> list[Path]:
    """Joins every wheel whose parts are all in ``folder`` or were in an earlier call; returns the new ones.

    Raises:
        LookupError: with one line: parts that are missing or damaged.
    """
    names = {path.name for place in (folder, cache) for path in place.glob("*.parts")}
    lists = {f"{path.name.rpartition('.part-')[0]}.parts" for path in folder.glob("*.part-*")}
    if alone := sorted(lists - names):
        raise LookupError(f"WHEELS: expected {alone[0]} beside its parts, got none: copy it too")
    joined, unfinished = [], []
    for name in sorted(names):
        manifest = _kept_manifest(name, folder, cache)
        try:
            joined += join(manifest, folder, cache)
        except LookupError as error:
            unfinished.append(str(error))
    if unfinished:
        raise LookupError("; ".join(unfinished))
    return joined


def join(manifest: Manifest, folder: Path, cache: Path) -> list[Path]:
    """The whole file in ``cache``, made if it is not there; [] where nothing was to do.

    Raises:
        LookupError: parts are missing, or what they make is not what was split.
    """
    whole = cache / manifest.name
    if (folder / manifest.name).exists() or (whole.exists() and whole.stat().st_size == manifest.bytes):
        _forget(manifest, cache)
        return []
    parts = [_right_part(manifest, index, folder, cache) for index in range(len(manifest.parts))]
    if None in parts:
        _keep([part for part in parts if part], cache)
        raise LookupError(_incomplete(manifest, parts, folder))
    new = cache / f"{manifest.name}.joining"
    found = _concatenate([part for part in parts if part], new)
    if found != manifest.sha256:
        new.unlink()
        raise LookupError(f"{manifest.name}: expected sha256 {manifest.sha256}, got {found}: split it again")
    new.replace(whole)
    _forget(manifest, cache)
    return [whole]


def _kept_manifest(name: str, folder: Path, cache: Path) -> Manifest:
    """The folder's manifest, which is kept for calls that bring parts only."""
    if (folder / name).exists():
        manifest = read(folder / name)
        cache.mkdir(parents=True, exist_ok=True)
        _copy(folder / name, cache / name)
        return manifest
    return read(cache / name)


def _right_part(manifest: Manifest, index: int, folder: Path, cache: Path) -> Path | None:
    """Where this part lies, undamaged."""
    for place in (cache, folder):
        path = place / manifest.part(index)
        if path.exists() and _sha256(path) == manifest.parts[index]:
            return path
    return None


def _incomplete(manifest: Manifest, parts: list[Path | None], folder: Path) -> str:
    absent = [index for index, part in enumerate(parts) if part is None]
    damaged = [f"{index:02}" for index in absent if (folder / manifest.part(index)).exists()]
    missing = [f"{index:02}" for index in absent if f"{index:02}" not in damaged]
    what = [f"{word} {' '.join(each)}" for word, each in (("damaged", damaged), ("missing", missing)) if each]
    return (
        f"{manifest.name}: expected {len(parts)} parts, got {len(parts) - len(absent)} ({', '.join(what)}): "
        "copy these into WHEELS and run again"
    )


def _keep(parts: list[Path], cache: Path) -> None:
    for part in parts:
        if part.parent != cache:
            _copy(part, cache / part.name)


def _forget(manifest: Manifest, cache: Path) -> None:
    """The parts have done their work."""
    for index in range(len(manifest.parts)):
        (cache / manifest.part(index)).unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    new = target.with_name(f"{target.name}.copying")
    shutil.copyfile(source, new)
    new.replace(target)


def _concatenate(parts: list[Path], into: Path) -> str:
    """Writes them one after the other; returns the sha256 of all."""
    digest = hashlib.sha256()
    with into.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(CHUNK_BYTES):
                    digest.update(block)
                    file.write(block)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
