"""``--export-best``: which checkpoint it is, and the export of it beside a real run that removes it afterwards."""

import json
import signal
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_support import Run, Train

from megatron_act.background_export import BackgroundExport
from megatron_act.checkpoint.export import export
from megatron_act.checkpoint.verify import verify_all
from megatron_act.compat import install_typing_override
from megatron_act.keep_checkpoints import superseded

install_typing_override()
from megatron_act import best_checkpoint  # noqa: E402  imports Megatron
from megatron_act.best_checkpoint import BestCheckpoint, conflict  # noqa: E402

STEPS, BEST = 6, 4
RISING = [
    "--lr",
    "0.3",
    "--min-lr",
    "0.3",
    "--lr-warmup-iters",
    "7",
    "--lr-decay-iters",
    "8",
]  # so that the loss does, at the end
COMMAND = ["--activation", "xielu", "--train-iters", str(STEPS), *RISING, "--pipeline-model-parallel-size", "2"]
INTERVALS = ["--eval-interval", "1", "--eval-iters", "2", "--save-interval", "2"]


@pytest.fixture(scope="module")
def everything(forked_train: Train) -> Run:
    """The same run with all its checkpoints."""
    run = forked_train(*COMMAND, *INTERVALS, ranks=2)
    assert run.code == 0, run.log[-3000:]
    return run


@pytest.fixture(scope="module")
def kept(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("best") / "hf" / "best"
    run = train(*COMMAND, *INTERVALS, "--export-best", str(folder), "--keep-last-checkpoints", "1", ranks=2)
    assert run.code == 0, run.log[-3000:]
    return run, folder


def evaluations(run: Run) -> dict[int, float]:
    found = [record for record in run.records if record["event"] == "evaluation" and record["split"] == "validation"]
    return {record["iteration"]: record["loss"] for record in reversed(found)}  # the first of an iteration


@pytest.mark.distributed
def test_the_best_saved_iteration_is_exported(kept: tuple[Run, Path], everything: Run, tmp_path: Path) -> None:
    """Not the last one, nor the evaluated one that was not saved; bit for bit the checkpoint's export."""
    run, folder = kept
    losses = evaluations(run)
    assert losses == evaluations(everything)
    assert min(losses, key=losses.__getitem__) == 3 and min((2, 4, 6), key=losses.__getitem__) == BEST
    exported, wanted = load_file(folder / "model.safetensors"), {}
    for iteration in (BEST, STEPS):
        export(everything.checkpoint / f"iter_{iteration:07d}", tmp_path / str(iteration), progress=False)
        wanted[iteration] = load_file(tmp_path / str(iteration) / "model.safetensors")
    assert set(exported) == set(wanted[BEST])
    assert all(exported[name].equal(wanted[BEST][name]) for name in exported)
    assert not exported["lm_head.weight"].equal(wanted[STEPS]["lm_head.weight"])


@pytest.mark.distributed
def test_its_logits_are_the_checkpoints(kept: tuple[Run, Path], everything: Run) -> None:
    pairs = [(everything.checkpoint / f"iter_{iteration:07d}", kept[1]) for iteration in (BEST, STEPS)]
    best, last = verify_all(pairs, length=64, windows=1, new_tokens=0)
    assert best.equal(1e-4) and not last.equal(1e-2)


@pytest.mark.distributed
def test_the_choice_is_noted_and_nothing_else_stays(kept: tuple[Run, Path]) -> None:
    run, folder = kept
    record = {"iteration": BEST, "validation_loss": evaluations(run)[BEST], "tokens": BEST * 8 * 64}
    assert json.loads((folder / "best.json").read_text()) == record
    assert json.loads((run.checkpoint / "best.json").read_text()) == record
    assert (
        f"{BEST} has the lowest validation loss:\n{record['validation_loss']:.6f} nats"
        in (folder / "README.md").read_text()
    )
    assert [path.name for path in folder.parent.iterdir()] == ["best"]
    assert [path.name for path in run.checkpoint.glob("iter_*")] == ["iter_0000006"]
    assert f"> megatron-act: exported iteration {BEST} (validation loss {record['validation_loss']:.6f}) to" in run.log


class Offers(BackgroundExport):
    """Notes what it is asked for."""

    def offer(self, record: dict) -> None:
        self.offered = [*getattr(self, "offered", []), record["iteration"]]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    monkeypatch.setattr(best_checkpoint, "BackgroundExport", Offers)
    sizes = {"consumed_train_samples": 8, "seq_length": 64, "train_iters": 6}
    return Namespace(rank=0, save=str(tmp_path), export_best=str(tmp_path / "best"), **sizes)


@pytest.mark.parametrize(
    ("events", "offered"),
    [
        ([("loss", 1, 5.0), ("save", 1), ("loss", 2, 4.0), ("save", 2), ("loss", 3, 4.5), ("save", 3)], [1, 2]),
        ([("save", 1), ("loss", 1, 5.0)], [1]),  # as after the last step
        ([("loss", 1, 5.0), ("save", 1), ("loss", 1, 4.0)], [1]),  # evaluated again
        ([("loss", 1, 3.0), ("save", 2), ("loss", 3, 4.0), ("save", 3)], [3]),  # the lowest was never saved
        ([("loss", 1, float("nan")), ("save", 1)], []),
        ([("loss", 1, 5.0), ("save", 1), ("loss", 2, 5.0), ("save", 2)], [1]),
    ],
)
def test_which_is_the_best(events: list[tuple], offered: list[int], arguments: Namespace) -> None:
    best = BestCheckpoint(arguments)
    for kind, iteration, *loss in events:
        best.after_evaluation(iteration, *loss) if kind == "loss" else best.after_save(iteration)
    assert getattr(best.exports, "offered", []) == offered


def test_the_next_start_knows_the_best_and_makes_up_for_its_export(arguments: Namespace, tmp_path: Path) -> None:
    best = BestCheckpoint(arguments)
    best.after_evaluation(4, 3.0)
    best.after_save(4)
    assert not hasattr(BestCheckpoint(arguments).exports, "offered")  # the checkpoint is gone
    (tmp_path / "iter_0000004").mkdir()
    (tmp_path / "iter_0000004" / "metadata.json").touch()
    again = BestCheckpoint(arguments)
    again.after_evaluation(6, 3.5)
    again.after_save(6)
    assert again.exports.offered == [4]
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "best.json").write_text((tmp_path / "best.json").read_text())
    assert not hasattr(BestCheckpoint(arguments).exports, "offered")


def test_a_note_that_cannot_be_written_is_a_line(
    arguments: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = BestCheckpoint(arguments)
    (best.file.with_name("best.json.new")).mkdir()
    best.after_evaluation(2, 1.5)
    best.after_save(2)
    assert f"{best.file} cannot be written (Is a directory): training goes on\n" in capsys.readouterr().out
    assert getattr(best.exports, "offered", []) == [2]


def checkpoints(folder: Path, *iterations: int) -> None:
    for iteration in iterations:
        (folder / f"iter_{iteration:07d}").mkdir()
        (folder / f"iter_{iteration:07d}" / "metadata.json").touch()
        (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def test_a_failed_export_is_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoints(tmp_path, 2)
    exports, freed = BackgroundExport(tmp_path, tmp_path / "best"), []
    exports.after = lambda: freed.append(exports.busy())
    exports.offer({"iteration": 2, "validation_loss": 1.5})
    exports.finish(600)
    shown = capfd.readouterr().out.splitlines()[-1]
    assert shown.startswith("> megatron-act: exporting iteration 2 (validation loss 1.500000) to ")
    assert "iter_0000002: expected a " in shown and shown.endswith("): training goes on")
    assert freed == [set()] and not (tmp_path / "best").exists()


def test_an_export_that_cannot_start_is_a_line_and_the_next_one_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints(tmp_path, 2, 4)
    monkeypatch.setattr("sys.executable", str(tmp_path / "none"))
    exports = BackgroundExport(tmp_path, tmp_path / "best")
    for iteration in (2, 4):
        exports.offer({"iteration": iteration, "validation_loss": 1.5})
        exports.finish(600)
    lines = [line for line in capfd.readouterr().out.splitlines() if "exporting" in line]
    assert [line.split()[4] for line in lines] == ["2", "4"] and all("No such file" in line for line in lines)
    assert exports.busy() == set()


def test_what_is_being_exported_stays(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Here the export of 6 waits for a save that goes on, as with ``--async-save``."""
    checkpoints(tmp_path, 2, 4)
    exports = BackgroundExport(tmp_path, tmp_path / "best")
    exports.offer({"iteration": 6, "validation_loss": 1.5})
    while not exports.now:
        time.sleep(0.01)
    exports.offer({"iteration": 7, "validation_loss": 1.4})
    exports.finish(0.3)
    assert [path.name for path in sorted(exports.busy())] == ["iter_0000006", "iter_0000007"]
    assert superseded(tmp_path, 1) == [tmp_path / "iter_0000002"]
    assert "the export of iteration 7 to" in capfd.readouterr().out


def test_the_end_of_an_export_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here the thread is none: it ends while it is waited for."""
    exports, waits = BackgroundExport(tmp_path, tmp_path / "best"), []

    def join(seconds: float) -> None:
        waits.append(seconds)
        exports.now = None

    exports.thread = Namespace(join=join)
    exports.now = {"iteration": 2, "validation_loss": 1.5}
    exports.finish(600)
    assert waits == [600] and not exports.stopped
    assert capsys.readouterr().out == f"> megatron-act: waiting up to 600 s for the export to {tmp_path / 'best'}\n"


def test_the_removal_after_an_export_is_never_cut_off(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though no time is given."""
    checkpoints(tmp_path, 2)
    monkeypatch.setattr("sys.executable", str(tmp_path / "none"))
    exports, begun, freed = BackgroundExport(tmp_path, tmp_path / "best"), threading.Event(), []

    def remove() -> None:
        begun.set()
        time.sleep(0.5)
        freed.append(2)

    exports.after = remove
    exports.offer({"iteration": 2, "validation_loss": 1.5})
    begun.wait()
    exports.finish(0)
    assert freed == [2]
    assert "waiting" not in (shown := capfd.readouterr().out) and "not finished" not in shown


def test_an_export_that_is_ended_keeps_its_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the next start, which makes it."""
    checkpoints(tmp_path, 2)
    endless = tmp_path / "endless"
    endless.write_text("#!/bin/sh\nexec sleep 600\n")
    endless.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(endless))
    exports, freed = BackgroundExport(tmp_path, tmp_path / "best"), []
    exports.after = lambda: freed.append(exports.busy())
    exports.offer({"iteration": 2, "validation_loss": 1.5})
    thread = exports.thread
    while not exports.process:
        time.sleep(0.01)
    exports.finish(0)
    thread.join()
    assert exports.process.returncode == -signal.SIGKILL
    assert freed == [] and exports.busy() == {tmp_path / "iter_0000002"}
    said = f"the export of iteration 2 to {tmp_path / 'best'} is not finished: the next start makes it"
    assert capfd.readouterr().out == f"> megatron-act: {said}\n"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"save": None}, "--export-best: expected --save DIR with it, got none"),
        ({"ckpt_format": "torch"}, "--export-best: expected --ckpt-format torch_dist, got torch"),
        ({"eval_iters": 0}, "--export-best: expected evaluations, got none"),
        ({"save_interval": 5}, "--export-best: expected --save-interval to be a multiple of --eval-interval 2, got 5"),
        (
            {"normalization": "LayerNorm"},
            "--export-best best: export: ApertusForCausalLM cannot express --normalization",
        ),
        ({"multiple_validation_sets": True}, "--export-best: expected one validation loss"),
        ({"export_best": None, "save": None}, None),
        ({}, None),
    ],
)
def test_what_cannot_be_served_is_refused(changes: dict[str, object], why: str | None) -> None:
    given = {"save": "x", "export_best": "best", "ckpt_format": "torch_dist", "normalization": "RMSNorm"}
    given |= {"eval_interval": 2, "eval_iters": 1, "save_interval": 4, "activation": "xielu", "qk_layernorm": True}
    given |= {"full_validation": False, "multiple_validation_sets": False}
    found = conflict(Namespace(**{**given, **changes}))
    assert found is None if why is None else str(found).startswith(why)
