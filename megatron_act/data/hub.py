"""Data sets on the Hugging Face hub: which files a configuration has, and one file at a time onto this disk.

A revision is resolved to its commit once, so every task of a run, and a resumed run, reads the same bytes. A download
goes on where an earlier one stopped, whatever ended that one; size and sha256 are checked when it is whole.
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE hold as everywhere in huggingface_hub.
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_act.errors import UserError

PREFIX = "hf://datasets/"
CHUNK_BYTES = 32 << 20  # one request; what a cut connection can lose


@dataclass(frozen=True)
class HubFile:
    """One file of a data set at a commit: `hf://datasets/OWNER/NAME@COMMIT/PATH`, its bytes, its checksum if known."""

    url: str
    size_bytes: int
    sha256: str | None


def is_hub(item: str) -> bool:
    """Whether an input names the hub."""
    return item.startswith("hf://")


def config_url(dataset: str, config: str, revision: str | None = None) -> str:
    """The folder of a FineWeb or FineWeb-Edu configuration.

    `sample-10BT` lies in `sample/10BT`, a dump (`CC-MAIN-2024-10`) in `data/CC-MAIN-2024-10`, `default` in `data`.
    """
    folder = "data" if config == "default" else f"data/{config}"
    if sample := re.fullmatch(r"sample-(\w+)", config):
        folder = f"sample/{sample[1]}"
    return f"{PREFIX}{dataset}{f'@{revision}' if revision else ''}/{folder}"


def list_files(url: str, suffixes: tuple[str, ...]) -> list[HubFile]:
    """The file that `url` names, or all files below it with one of the suffixes, sorted by path.

    Raises:
        UserError: not a data set's URL, no such data set, revision or folder, no such files, or no connection.
    """
    dataset, revision, folder = _parse(url)
    with _explained(url):
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        commit = api.dataset_info(dataset, revision=revision).sha
        if folder.endswith(suffixes):
            entries: list[Any] = api.get_paths_info(dataset, [folder], revision=commit, repo_type="dataset")
        else:
            tree = api.list_repo_tree(dataset, folder, recursive=True, revision=commit, repo_type="dataset")
            entries = sorted(tree, key=lambda entry: entry.path)
        files = [entry for entry in entries if isinstance(entry, RepoFile) and entry.path.endswith(suffixes)]
    if not files:
        raise UserError(f"expected {' or '.join(suffixes[:2])} files at {url}, got none; check the folder")
    base = f"{PREFIX}{dataset}@{commit}/"
    return [HubFile(base + file.path, file.size, file.lfs.sha256 if file.lfs else None) for file in files]


def _parse(url: str) -> tuple[str, str | None, str]:
    """Data set, revision or None, path inside it."""
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*?))?/*", url)
    if not match:
        raise UserError(f"expected hf://datasets/OWNER/NAME[@REVISION]/FOLDER, got {url}; correct it")
    return match[1], match[2], match[3] or ""


def download(file: HubFile, folder: Path) -> Path:
    """Bring a file into `folder`, going on from what an earlier call left there; one already whole is returned as is.

    Raises:
        UserError: no connection after repeated tries, or bytes that are not the hub's.
        OSError: the disk is full.
    """
    target = folder / file.url.removeprefix(PREFIX)
    part = target.with_name(target.name + ".part")
    if target.is_file() and target.stat().st_size == file.size_bytes:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as sink:
        fcntl.flock(sink, fcntl.LOCK_EX)  # two runs that share a folder take turns
        if not part.exists():  # and the other one has finished it
            return download(file, folder)
        _fetch(file, sink)
        os.fsync(sink.fileno())
        _check(file, part)
        os.replace(part, target)
    return target


def _fetch(file: HubFile, sink: IO[bytes]) -> None:
    """Append what `sink` lacks, a chunk a request; huggingface_hub repeats a request that fails."""
    read = _ranges(file)
    while (done := sink.tell()) < file.size_bytes:
        with _explained(file.url):
            chunk = read(done, min(CHUNK_BYTES, file.size_bytes - done))
        if not chunk:
            raise UserError(f"expected {file.size_bytes} bytes of {file.url}, got {done}; try again with --resume")
        sink.write(chunk)


def _ranges(file: HubFile) -> Callable[[int, int], bytes]:
    with _explained(file.url):
        from huggingface_hub import HfFileSystem

        system = HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT"))
        remote = system.open(file.url, "rb", cache_type="none", size=file.size_bytes)

    def read(start: int, count: int) -> bytes:
        remote.seek(start)
        return remote.read(count)

    return read


def _check(file: HubFile, part: Path) -> None:
    with part.open("rb") as source:
        checksum = hashlib.file_digest(source, "sha256").hexdigest()
    got = f"{part.stat().st_size} bytes with sha256 {checksum}"
    if part.stat().st_size != file.size_bytes or checksum != (file.sha256 or checksum):
        part.unlink()  # nothing to go on from
        raise UserError(
            f"expected {file.size_bytes} bytes with sha256 {file.sha256} from {file.url}, got {got}; "
            "try again with --resume"
        )


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Whatever goes wrong between here and the hub, in one line."""
    try:
        yield
    except Exception as error:  # of several libraries, without a common base
        first = (str(error).strip() or "no details").splitlines()[0]
        raise UserError(
            f"expected an answer of the hub about {url}, got {type(error).__name__}: {first}; "
            "check the name, the connection and HF_TOKEN, then try again"
        ) from error
