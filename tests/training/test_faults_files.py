"""Checkpoints on disk: which can be read, which one is loaded instead, which are removed. No training."""

import os
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint

from megatron_act.checkpoint.reader import TRACKER
from megatron_act.compat import install_typing_override
from megatron_act.errors import UserError
from megatron_act.fallback_load import damage, ensure_readable
from megatron_act.keep_checkpoints import remove, superseded


def save(folder: Path, iteration: int, completed: int) -> Path:
    """A checkpoint as ``torch_dist`` lays it out, completed at a given time."""
    path = folder / f"iter_{iteration:07d}"
    checkpoint.save({"weight": torch.arange(1000.0)}, checkpoint_id=path, no_dist=True)
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    os.utime(path / "metadata.json", (completed, completed))
    (folder / TRACKER).write_text(str(iteration))
    return path


def arguments(load: Path, **more: object) -> Namespace:
    return Namespace(**{"load": str(load), "ckpt_format": "torch_dist", "ckpt_step": None, **more})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_a_whole_checkpoint_is_left_alone(tmp_path: Path) -> None:
    assert damage(save(tmp_path, 20, completed=1)) is None
    assert ensure_readable(arguments(tmp_path)) is None
    assert (tmp_path / TRACKER).read_text() == "20"


@pytest.mark.parametrize(
    ("name", "ruin", "why"),
    [
        ("__0_0.distcp", cut, r"__0_0.distcp has \d+ of \d+ bytes"),
        ("__0_0.distcp", Path.unlink, "__0_0.distcp is missing"),
        (".metadata", cut, ".metadata is missing or broken"),
        (".metadata", lambda file: file.write_bytes(pickle.dumps({})), ".metadata is missing or broken"),
        (".metadata", Path.unlink, ".metadata is missing or broken"),
        ("metadata.json", lambda file: file.write_text("{"), "metadata.json is missing or broken"),
        ("metadata.json", Path.unlink, "metadata.json is missing or broken"),
    ],
)
def test_a_broken_one_is_passed_over(tmp_path: Path, name: str, ruin: object, why: str) -> None:
    """Not for a later iteration, of a run that was given up, nor for one that is broken itself."""
    save(tmp_path, 10, completed=1)
    cut(save(tmp_path, 20, completed=2) / "__0_0.distcp")
    save(tmp_path, 100, completed=3)
    ruin(save(tmp_path, 30, completed=4) / name)  # type: ignore[operator]
    said = ensure_readable(arguments(tmp_path))
    assert said is not None and said.endswith("falling back to iteration 10, the one before")
    with pytest.raises(UserError, match=why):
        ensure_readable(arguments(tmp_path, ckpt_step=30))
    assert (tmp_path / TRACKER).read_text() == "10"
    assert ensure_readable(arguments(tmp_path)) is None


def test_without_another_one_the_run_is_refused(tmp_path: Path) -> None:
    cut(save(tmp_path, 20, completed=1) / "__0_0.distcp")
    with pytest.raises(UserError, match=r"expected a readable checkpoint, got a broken one .* and no earlier one"):
        ensure_readable(arguments(tmp_path))
    assert (tmp_path / TRACKER).read_text() == "20"


def test_a_start_from_scratch_beside_checkpoints_is_not_silent(tmp_path: Path) -> None:
    assert ensure_readable(arguments(tmp_path)) is None
    save(tmp_path, 20, completed=1)
    (tmp_path / TRACKER).unlink()
    assert "so nothing is loaded, and complete checkpoints (last 20)" in (ensure_readable(arguments(tmp_path)) or "")


def test_the_last_complete_ones_stay(tmp_path: Path) -> None:
    """What is half-written counts for nothing and goes with its age; what is later, or a link, stays."""
    paths = {iteration: save(tmp_path, iteration, completed=iteration) for iteration in (10, 20, 30, 40, 50)}
    (paths[30] / "metadata.json").unlink()
    (tmp_path / "iter_0000005").symlink_to(paths[50])
    (tmp_path / TRACKER).write_text("40")
    assert superseded(tmp_path, 2) == [paths[10]]
    assert superseded(tmp_path, 1) == [paths[10], paths[20], paths[30]]
    assert superseded(tmp_path, 9) == []
    remove(superseded(tmp_path, 1))
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000005", "iter_0000040", "iter_0000050"]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"keep_last_checkpoints": 0}, "--keep-last-checkpoints: expected 1 or more, got 0"),
        ({"keep_last_checkpoints": 2, "save": None}, "--keep-last-checkpoints: expected --save DIR"),
        ({"keep_last_checkpoints": 2, "save_retain_interval": 9}, "--keep-last-checkpoints and --save-retain-interval"),
        ({"save_interval_minutes": 0.0}, "--save-interval-minutes: expected more than 0, got 0"),
        ({"save_interval_minutes": 1.0, "save": None}, "--save-interval-minutes: expected --save DIR"),
        ({}, None),
    ],
)
def test_what_cannot_be_served_is_refused(flags: dict[str, object], why: str | None) -> None:
    install_typing_override()
    from megatron_act import saves  # imports Megatron

    names = ("keep_last_checkpoints", "save_interval_minutes", "save_retain_interval", "export_best")
    found = saves.conflict(Namespace(**{**dict.fromkeys(names), "save": "x", **flags}))
    assert found is None if why is None else str(found).startswith(why)
