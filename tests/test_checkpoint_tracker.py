"""An empty tracker names the checkpoint that was completed last; any other that names none is refused."""

import os
from pathlib import Path

import pytest

from megatron_act.checkpoint.reader import TRACKER
from megatron_act.checkpoint.tracker import repair_tracker
from megatron_act.errors import UserError


def save(folder: Path, iteration: int, completed: int | None) -> None:
    """A checkpoint's folder; ``completed``: when, None: never."""
    checkpoint = folder / f"iter_{iteration:07d}"
    checkpoint.mkdir()
    (checkpoint / "__0_0.distcp").touch()
    if completed is not None:
        (checkpoint / "metadata.json").touch()
        os.utime(checkpoint / "metadata.json", (completed, completed))


def test_an_empty_tracker_names_what_was_completed_last(tmp_path: Path) -> None:
    """Not the highest number: the run may have gone back to an earlier one; not one that is being written."""
    save(tmp_path, 100, completed=10)
    save(tmp_path, 20, completed=30)
    save(tmp_path, 30, completed=None)
    (tmp_path / TRACKER).touch()
    assert "set to 20" in (repair_tracker(tmp_path) or "")
    assert (tmp_path / TRACKER).read_text() == "20"
    assert sorted(path.name for path in tmp_path.glob(f"{TRACKER}*")) == [TRACKER]
    assert repair_tracker(tmp_path) is None


@pytest.mark.parametrize("word", ["7", "release", None])
def test_a_tracker_that_names_one_or_is_not_there_stays(tmp_path: Path, word: str | None) -> None:
    save(tmp_path, 20, completed=30)
    if word:
        (tmp_path / TRACKER).write_text(word)
    assert repair_tracker(tmp_path) is None
    assert (tmp_path / TRACKER).exists() == bool(word)
    assert not word or (tmp_path / TRACKER).read_text() == word


@pytest.mark.parametrize(("word", "completed"), [("latest", 30), ("", None)])
def test_a_tracker_that_cannot_be_repaired_is_refused(tmp_path: Path, word: str, completed: int | None) -> None:
    save(tmp_path, 20, completed)
    (tmp_path / TRACKER).write_text(word)
    with pytest.raises(UserError, match=f"{TRACKER}: expected an iteration number, got '{word}': write"):
        repair_tracker(tmp_path)
    assert (tmp_path / TRACKER).read_text() == word
