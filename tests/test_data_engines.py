"""datatrove's executors: the local one is what runs, Slurm's scripts do the whole job, Ray is asked for by name."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
from data_support import call_tool, run_tool, same_files, sample_texts, tokenizer_folder, write_parquet

from megatron_act.data import preprocess as preprocess_module
from megatron_act.data.engine import Executor
from megatron_act.data.preprocess import make_plan, preprocess, run
from megatron_act.errors import UserError

SBATCH = """#!{python}
# Runs an array job's tasks one after the other, as Slurm would on one node, and refuses one whose dependency failed.
import os, re, subprocess, sys
from pathlib import Path
state = Path(os.environ["FAKE_SLURM"])
script = Path(sys.argv[-1]).read_text()
options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE))
words = dict(item[2:].split("=", 1) for item in sys.argv[1:-1])
number = len(list(state.glob("*.sh"))) + 1
options.update({{key: value for key, value in words.items() if key != "export"}})
(state / f"{{number}}.sh").write_text(script)
waits = re.fullmatch(r"afterok:(\\d+)", options.get("dependency", ""))
stuck = bool(waits) and (state / f"{{waits[1]}}.failed").exists()
codes = [1] if stuck else []
first, last = map(int, re.match(r"(\\d+)-(\\d+)", options["array"]).groups())
for index in range(first, first if stuck else last + 1):
    offset = words["export"].partition("RUN_OFFSET=")[2] if "export" in words else "0"
    environment = {{**os.environ, "SLURM_ARRAY_TASK_ID": str(index), "SLURM_JOB_ID": str(number), "RUN_OFFSET": offset}}
    environment["SLURM_NODELIST"] = "node1"
    log = (state / f"{{number}}_{{index}}.log").open("w")
    codes.append(subprocess.run(["bash", sys.argv[-1]], env=environment, stdout=log, stderr=log).returncode)
if any(codes):
    (state / f"{{number}}.failed").touch()
(state / f"{{number}}.options").write_text(repr(options))
print("Submitted batch job", number)
"""
SRUN = '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\necho "${@: -1}"\n'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch, srun and scontrol on the PATH; the folder where the jobs' scripts, options and logs are."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "jobs").mkdir()
    for name, text in {"sbatch": SBATCH.format(python=sys.executable), "srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "jobs"))
    return tmp_path / "jobs"


def source(folder: Path) -> Path:
    return write_parquet(folder / "in.parquet", row_group_size=50, text=sample_texts()[:300])


SLURM = ["--executor", "slurm", "--slurm", "partition=cpu", "time=01:00:00", "account=us"]


def test_slurm_does_the_whole_job(slurm: Path, tmp_path: Path) -> None:
    """Encoding as an array, then joining; same files as here, nothing left but scripts and logs."""
    arguments = [
        "--input",
        source(tmp_path),
        "--tokenizer",
        tokenizer_folder("bpe"),
        "--output-prefix",
        tmp_path / "out",
    ]
    result = run_tool(*arguments, "--tasks", 3, "--workers", 2, *SLURM)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"sent to Slurm: {tmp_path / 'out'} is there when job 3 has ended")
    logs = {path.name: path.read_text() for path in slurm.glob("*.log")}
    assert not list(slurm.glob("*.failed")), logs
    encode = (slurm / "1.sh").read_text()
    for line in ("partition=cpu", "time=01:00:00", "account=us", "array=0-2%2", "job-name=tokenize"):
        assert f"#SBATCH --{line}\n" in encode
    preprocess([tmp_path / "in.parquet"], tokenizer_folder("bpe"), tmp_path / "here")
    assert same_files(tmp_path / "out", tmp_path / "here") and not (tmp_path / "out.work").exists()
    assert call_tool("verify", tmp_path / "out").returncode == 0


def test_slurm_goes_on_after_a_failed_task(slurm: Path, tmp_path: Path) -> None:
    """A damaged file fails its task and so the join; repaired, --resume sends that one task and the join."""
    files = [write_parquet(tmp_path / f"{i}.parquet", row_group_size=50, text=sample_texts()[:50]) for i in range(3)]
    content = files[1].read_bytes()
    files[1].write_bytes(content[:10] + bytes(200) + content[210:])
    arguments = ["--input", *files, "--tokenizer", tokenizer_folder("bpe"), "--output-prefix", tmp_path / "out"]
    assert run_tool(*arguments, "--tasks", 3, *SLURM).returncode == 0
    assert (slurm / "1.failed").exists() and not (tmp_path / "out.bin").exists()
    assert "expected intact rows" in (tmp_path / "out.work/tasks/00001.error").read_text()
    sent = len(list(slurm.glob("*.sh")))
    files[1].write_bytes(content)
    result = run_tool(*arguments, "--tasks", 3, *SLURM, "--resume")
    assert (result.returncode, result.stderr) == (0, "")
    assert "array=0-0" in (slurm / f"{sent + 1}.sh").read_text()
    preprocess(files, tokenizer_folder("bpe"), tmp_path / "here")
    assert same_files(tmp_path / "out", tmp_path / "here")


SLURM_FAULTS = {
    "no options": (
        ["--executor", "slurm"],
        "expected --slurm partition=NAME time=HH:MM:SS, got no partition and no time",
    ),
    "no value": (["--executor", "slurm", "--slurm", "partition"], "expected --slurm KEY=VALUE ..., got partition"),
    "no sbatch": (SLURM, "expected sbatch to take the jobs, got [Errno 2] No such file or directory: 'sbatch'"),
}


@pytest.mark.parametrize("case", SLURM_FAULTS)
def test_slurm_faults(case: str, tmp_path: Path) -> None:
    flags, message = SLURM_FAULTS[case]
    arguments = [
        "--input",
        source(tmp_path),
        "--tokenizer",
        tokenizer_folder("bpe"),
        "--output-prefix",
        tmp_path / "out",
    ]
    result = call_tool(*arguments, *flags)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out.work").exists()


def test_ray_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    plan = make_plan([source(tmp_path)], tokenizer_folder("bpe"), tmp_path / "out")
    with pytest.raises(UserError, match="expected the ray package for --executor ray"):
        run(plan, Executor("ray"))
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_here_it_is_datatrove_that_runs(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its executor gives out the tasks, marks them complete and counts their rows and tokens, each task's apart."""
    seen = []
    logs = tmp_path / "out.work" / "datatrove"

    def watched(work, clock, real=preprocess_module.finish_run):  # type: ignore[no-untyped-def]
        marks = sorted(path.name for path in (logs / "completions").iterdir())
        counts = [json.loads(path.read_text())[0]["stats"] for path in sorted((logs / "stats").iterdir())]
        seen.append((marks, counts, [sum(part["tokens"] for part in work.result(i)["parts"]) for i in range(3)]))
        return real(work, clock)

    monkeypatch.setattr(preprocess_module, "finish_run", watched)
    run(make_plan([source(tmp_path)], tokenizer_folder("bpe"), tmp_path / "out", tasks=3), Executor(workers=workers))
    [(marks, counts, tokens)] = seen
    assert marks == ["00000", "00001", "00002"]
    assert [count["rows"]["total"] for count in counts] == [100, 100, 100]
    assert [count["tokens"]["total"] for count in counts] == tokens
