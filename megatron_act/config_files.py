"""The files of ``configs/``: one baseline per model, and the files that the compute match makes from it.

``configs/NAME-swiglu.yaml`` is written by hand; ``configs/NAME-ACTIVATION.yaml`` is what
``tools/compute_match.py --model NAME --activation ACTIVATION --output FILE`` makes of it.
"""

import contextlib
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_act.errors import UserError
from megatron_act.model_args import ROOT_KEY, Flags

FOLDER = Path(__file__).resolve().parents[1] / "configs"
BASELINE = "swiglu"
ACTIVATIONS = (BASELINE, "xielu", "relu2", "crrelu", "gelu")  # every model has a file for each


def names() -> list[str]:
    """The models of ``configs/`` that have a baseline."""
    return sorted(path.name.removesuffix(f"-{BASELINE}.yaml") for path in FOLDER.glob(f"*-{BASELINE}.yaml"))


def named(name: str, activation: str = BASELINE) -> Path:
    """The file of a model of ``configs/``.

    Raises:
        UserError: no model of that name, or none with that activation.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--model: expected one of {', '.join(known)}, got {name!r}{hint}")
    path = FOLDER / f"{name}-{activation}.yaml"
    if not path.is_file():
        raise UserError(
            f"{path}: expected a config, got none: write it with "
            f"tools/compute_match.py --model {name} --activation {activation} --output {path}"
        )
    return path


def render(flags: Mapping[str, Any], header: str = "", like: str = "") -> str:
    """Flags as the text of a MODEL_ARGS file.

    Args:
        header: becomes a comment at the top.
        like: text of the file that the flags come from: its comments above a flag, and its way to write a value that
            has not changed, are kept.
    """
    lines = [f"# {line}".rstrip() for line in header.splitlines()] + [f"{ROOT_KEY}:"]
    written, above = _lines_of(like)
    for flag, value in flags.items():
        lines += above.get(flag, [])
        kept = written.get(flag, "")
        lines.append(kept if _says(kept, {flag: value}) else _indented({flag: value}))
    return "\n".join(lines) + "\n"


def _lines_of(text: str) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Each flag's line in a MODEL_ARGS file of one line a flag, and the comments above it."""
    written: dict[str, str] = {}
    above: dict[str, list[str]] = {}
    comments: list[str] = []
    for line in text.partition(f"{ROOT_KEY}:\n")[2].splitlines():
        flag = line.strip().partition(":")[0]
        if flag.startswith("#"):
            comments.append(line)
        elif flag.startswith("--"):
            written[flag], above[flag], comments = line, comments, []
    return written, above


def _says(line: str, item: Flags) -> bool:
    try:
        return bool(yaml.safe_load(line) == item)
    except yaml.YAMLError:  # the first line of a value over several
        return False


def _indented(item: Flags) -> str:
    return "\n".join(f"  {line}" for line in yaml.safe_dump(item).splitlines())


def header_of(text: str) -> str:
    """The comment at the top of a file, without its hashes."""
    lines = text.partition(f"{ROOT_KEY}:")[0].splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def write(path: str | Path, flags: Mapping[str, Any], header: str = "", like: str = "") -> None:
    """Writes flags in MODEL_ARGS form (`render`); the file appears whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(render(flags, header, like), encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}): choose another file") from None
