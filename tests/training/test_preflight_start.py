"""``--preflight-only`` as the start of a run: what the training would take by default, mend and open."""

from pathlib import Path

import pytest
from test_refusals import entry
from training_support import MODEL_FLAGS, Train

pytestmark = pytest.mark.distributed


def test_it_takes_the_trainings_tokenizer_says_what_it_mends_and_opens_no_board(
    forked_train: Train, data_flags: list[str], tmp_path: Path
) -> None:
    """The latest checkpoint is a byte short; no ``--tokenizer-type`` is given."""
    words = ["--activation", "xielu", "--train-iters", "2", "--save-interval", "1"]
    done = forked_train(*words)
    assert done.code == 0, done.log[-2000:]
    file = done.checkpoint / "iter_0000002" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    given = [word for word in data_flags if word not in ("--tokenizer-type", "HuggingFaceTokenizer")]
    folders = ["--load", str(done.checkpoint), "--save", str(done.checkpoint), "--tensorboard-dir", str(tmp_path / "t")]
    checked = entry(["--preflight-only", "--cpu", *MODEL_FLAGS, *words, *given, *folders], tmp_path)
    lines = checked.stdout.splitlines()
    assert checked.returncode == 0 and lines[-1].endswith(" checks passed, 0 failed"), checked.stdout[-2000:]
    assert ["tokenizer", "512", "tokens"] in [line.split() for line in lines]
    (said,) = [line for line in lines if line.startswith("> megatron-act: ")]
    assert said.endswith("falling back to iteration 1, the one before")
    assert "INFO:" not in checked.stdout + checked.stderr
    assert list(tmp_path.iterdir()) == []
