"""Parts of README.md that are written from results: what stands between two marker lines."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_act.errors import UserError, run_cli

ROOT = Path(__file__).resolve().parents[1]


def replaced(readme: str, begin: str, end: str, text: str) -> str:
    """``readme`` with ``text`` between the markers.

    Raises:
        UserError: a marker is missing, or there twice.
    """
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise UserError(f"README.md: expected one line {begin!r} and one {end!r}, got others; put them back")
    before, rest = readme.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{text}\n{end}{after}"


def committed(path: Path, remedy: str) -> dict[str, Any] | None:
    """A committed JSON of results, None where there is none.

    Args:
        path: the file.
        remedy: what makes it anew.

    Raises:
        UserError: it is no JSON.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path.name}: expected JSON, got {error}; {remedy}") from None


def main(description: str | None, rendered: Callable[[str], str]) -> int:
    """The command that rewrites README.md by ``rendered``; returns the exit code."""
    parse = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return run_cli(lambda: _rewrite(ROOT / "README.md", rendered), parse.parse_args().debug)


def _rewrite(path: Path, rendered: Callable[[str], str]) -> None:
    path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")
