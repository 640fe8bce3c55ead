"""Whether a checkpoint's files are as long as its ``.metadata`` says: one look at each file, no reading."""

from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata


def shortened(checkpoint: Path, metadata: Metadata) -> str | None:
    """The first file that is missing or cut short, in a few words, or None.

    Args:
        checkpoint: an ``iter_XXXXXXX`` folder.
        metadata: of it; each chunk has a file, an offset and a length in bytes.
    """
    needed: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, size in sorted(needed.items()):
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if (found := file.stat().st_size) < size:
            return f"{name} has {found} of {size} bytes"
    return None
