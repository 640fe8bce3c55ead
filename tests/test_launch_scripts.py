"""The scripts run by bash, with stand-ins for torchrun, Slurm and apptainer: same words everywhere, notices, codes."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from launch_support import GPUS, MODEL, NODES, PLATFORMS, ROOT, Fakes, fakes, script_of, write_config

from megatron_act.launch.__main__ import PLATFORMS as RENDERERS
from megatron_act.launch.__main__ import job_of, parser

NASTY = ["--data-path", "a b", "it's", 'say "$HOME"', "--lr", "2e-3"]
RESTARTED = 143
WAIT_S = 300.0  # for what takes a second, on a machine that stands still meanwhile


@pytest.fixture
def fake(tmp_path: Path) -> Fakes:
    return fakes(tmp_path)


def launched(
    fake: Fakes, platform: str, *words: str, launch: dict | None = None, extra: list[str] | None = None
) -> str:
    """The script of a platform for the four-node job, whose Python is the stand-in."""
    keys = {"output": str(fake.folder / "runs"), "image": "image:1", "python": str(fake.python), **(launch or {})}
    config = write_config(fake.folder, keys, **{"--adam-beta2": 0.95})
    sizes = ["--nodes", str(NODES), "--gpus-per-node", str(GPUS)]
    args = parser().parse_args([str(config), *sizes, "--platform", platform, *words])
    return script_of(platform, RENDERERS[platform].render(job_of(args, extra or [])))


def run(fake: Fakes, platform: str, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    whole = fake.environment(platform, **env)
    return subprocess.run(
        ["bash", "-c", script], env=whole, cwd=ROOT, text=True, capture_output=True, timeout=WAIT_S, check=False
    )


def options(words: list[str]) -> dict[str, str]:
    """torchrun's own options, up to the module."""
    own = words[2 : words.index("--config")]
    return dict(zip(own[::2], own[1::2], strict=True))


def test_the_same_words_reach_torchrun_on_every_platform(tmp_path: Path) -> None:
    """All but the names of node 0 and of the job: broken by any option, quote or flag that one platform alone has."""
    seen = {}
    for platform in PLATFORMS:
        folder = tmp_path / platform
        folder.mkdir()
        fake = fakes(folder)
        done = run(fake, platform, launched(fake, platform, extra=NASTY))
        assert (done.returncode, done.stderr) == (0, ""), platform
        preflight, training = fake.runs()
        assert yaml.safe_load(training["config"])["MODEL_ARGS"] == {**MODEL, "--adam-beta2": 0.95}
        words = [word.replace(str(folder), "FOLDER") for word in training["words"]]
        config = words.index("--config") + 1
        seen[platform] = (options(words), words[config + 1 :], training["env"]["CUDA_DEVICE_MAX_CONNECTIONS"])
        assert preflight["words"][config + 1 :] == training["words"][config + 1 :]
        assert options(preflight["words"])["--max-restarts"] == "0"
        assert options(preflight["words"])["-m"] == "megatron_act.preflight"
    _compare(seen)


def _compare(seen: dict[str, tuple[dict[str, str], list[str], str]]) -> None:
    endpoints = {
        "local": "first:29400",
        "slurm": "first:28014",
        "kubernetes": "demo-master-0:29400",
        "jobset": "demo-node-0-0.demo:29400",
        "skypilot": "first:29400",
    }
    ids = {"local": "local", "slurm": "40007-0", "kubernetes": "demo", "jobset": "demo", "skypilot": "demo"}
    for platform, (torchrun, words, connections) in seen.items():
        assert torchrun.pop("--rdzv-endpoint") == endpoints[platform]
        assert torchrun.pop("--rdzv-id") == f"{ids[platform]}-megatron_act.pretrain_gpt"
        assert (torchrun, words, connections) == (seen["local"][0], seen["local"][1], "1")
    folder = "FOLDER/runs/demo"
    assert seen["local"][0] == {
        "--nnodes": "4",
        "--nproc-per-node": "8",
        "--max-restarts": "3",
        "--rdzv-backend": "c10d",
        "--rdzv-conf": "is_host=0,join_timeout=900,read_timeout=900",
        "--local-addr": "second",
        "--log-dir": f"{folder}/logs/node-1",
        "--redirects": "3",
        "--tee": "3",
        "-m": "megatron_act.pretrain_gpt",
    }
    paths = ["--save", f"{folder}/checkpoints", "--load", f"{folder}/checkpoints", "--save-interval", "1000"]
    records = ["--tensorboard-dir", f"{folder}/tensorboard", "--metrics-jsonl", f"{folder}/metrics.jsonl"]
    assert seen["local"][1] == ["--exit-signal-handler", *paths, *records, *NASTY]


def test_node_0_hosts_the_rendezvous(fake: Fakes) -> None:
    script = launched(fake, "local", "--no-preflight")
    assert run(fake, "local", script, NODE_RANK="0").returncode == 0
    (training,) = fake.runs()
    assert options(training["words"])["--rdzv-conf"].startswith("is_host=1,")


def test_launch_gives_paths_and_variables_unless_flags_do(fake: Fakes) -> None:
    launch = {"train_data": "a b", "tokenizer": "tok", "env": {"NCCL_IB_HCA": "mlx5", "CUDA_DEVICE_MAX_CONNECTIONS": 8}}
    script = launched(fake, "local", "--no-preflight", launch=launch, extra=["--save", "elsewhere"])
    assert run(fake, "local", script).returncode == 0
    (training,) = fake.runs()
    words = training["words"]
    assert words[words.index("--train-data-path") :][:5] == ["--train-data-path", "a", "b", "--tokenizer-model", "tok"]
    assert [words[i + 1] for i, word in enumerate(words) if word == "--save"] == ["elsewhere"]
    assert training["env"]["NCCL_IB_HCA"] == "mlx5" and training["env"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert training["env"]["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)


def test_a_failed_preflight_ends_the_job_with_2(fake: Fakes) -> None:
    done = run(fake, "slurm", launched(fake, "slurm"), FAKE_CODE="1")
    assert done.returncode == 2
    assert [options(item["words"])["-m"] for item in fake.runs()] == ["megatron_act.preflight"]
    assert fake.said("scontrol") == ["show hostnames first,second"]  # no requeue


def test_preflight_only(fake: Fakes) -> None:
    script = launched(fake, "kubernetes", "--preflight-only", launch={"min_bus_gbps": 100})
    assert run(fake, "kubernetes", script).returncode == 0
    (only,) = fake.runs()
    assert only["words"][-2:] == ["--min-bus-gbps", "100"]


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_slurm_in_a_container(runtime: str, fake: Fakes) -> None:
    launch = {"runtime": runtime, "image": "act image.sqsh", "mounts": ["/data"]}
    assert run(fake, "slurm", launched(fake, "slurm", "--no-preflight", launch=launch)).returncode == 0
    assert len(fake.runs()) == 1
    (srun,) = fake.said("srun")
    mounts = [str(ROOT), str(fake.folder / "runs"), "/data"]
    pyxis = f"--container-image=act image.sqsh --container-mounts={','.join(f'{path}:{path}' for path in mounts)} bash"
    wanted = {"pyxis": pyxis, "apptainer": f"apptainer exec --nv --bind {','.join(mounts)} act image.sqsh bash"}
    assert wanted[runtime] in srun


@contextlib.contextmanager
def training(fake: Fakes, platform: str) -> Iterator[subprocess.Popen]:
    """The script as a process group of its own, whose rank trains."""
    script = launched(fake, platform, "--no-preflight")
    env = fake.environment(platform, FAKE_RANK=str(fake.folder / "rank.py"))
    with (fake.folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(["bash", "-c", script], env=env, stderr=errors, start_new_session=True)
    try:
        wait_for((fake.folder / "ready").exists, process)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Until it holds; the process may not end before."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def noticed(fake: Fakes, platform: str, sent: signal.Signals, whole_group: bool = False) -> int:
    """The exit code of a job that gets a notice while its rank trains."""
    (fake.folder / "end").touch()
    with training(fake, platform) as process:
        (os.killpg if whole_group else os.kill)(process.pid, sent)
        return process.wait(timeout=WAIT_S)


@pytest.mark.parametrize(
    ("platform", "sent", "code"),
    [
        ("local", signal.SIGTERM, 0),
        ("slurm", signal.SIGUSR1, 0),
        ("slurm", signal.SIGTERM, 0),
        ("kubernetes", signal.SIGTERM, RESTARTED),
        ("jobset", signal.SIGTERM, RESTARTED),
        ("skypilot", signal.SIGTERM, RESTARTED),
    ],
)
def test_a_notice_makes_the_ranks_save(platform: str, sent: signal.Signals, code: int, fake: Fakes) -> None:
    """The stand-in of torchrun dies of a signal, as torchrun would: only its ranks may get one."""
    assert noticed(fake, platform, sent) == code
    assert (fake.folder / "saved").exists()
    requeued = [line for line in fake.said("scontrol") if line.startswith("requeue")]
    assert requeued == (["requeue 40007"] if platform == "slurm" else [])


@pytest.mark.parametrize("attempt", range(5))
def test_a_signal_to_all_processes_does_not_end_the_ranks(attempt: int, fake: Fakes) -> None:
    """As Slurm sends it with proctrack/linuxproc; breaks without the ignored SIGUSR1 around torchrun.

    Every script gets it twice, often while its child ends: waiting that asks whether the child lives lost its code.
    """
    assert noticed(fake, "slurm", signal.SIGUSR1, whole_group=True) == 0
    assert (fake.folder / "saved").exists()


def test_a_rank_hears_of_two_notices_once(fake: Fakes) -> None:
    """The second could reach it while it ends. The script forwards a notice before it says so."""
    said, saved = fake.folder / "errors.txt", fake.folder / "saved"
    with training(fake, "local") as process:
        for count in (1, 2):
            process.terminate()
            wait_for(lambda count=count: said.read_text().count("notice received") == count, process)
            wait_for(saved.exists, process)  # two that wait for a rank are one
        (fake.folder / "end").touch()
        assert process.wait(timeout=WAIT_S) == 0
    assert saved.read_text() == "saved\n"


@pytest.mark.parametrize("platform", ["kubernetes", "jobset", "skypilot"])
def test_nodes_without_a_notice_learn_why_the_run_ended(platform: str, fake: Fakes) -> None:
    """One pod is evicted, the ranks of all save and end well: the other pods must be started again too.

    Here node 0 is so fast that its next start is over before this node looks; a deleted mark would end this one with 0.
    For node 0's next start the mark is an earlier run's.
    """
    first = {"kubernetes": "PET_NODE_RANK", "jobset": "JOB_COMPLETION_INDEX", "skypilot": "SKYPILOT_NODE_RANK"}
    script = launched(fake, platform, "--no-preflight")
    with training(fake, platform) as process:
        (fake.folder / "runs" / "demo" / "preempted-demo").touch()
        assert run(fake, platform, script, **{first[platform]: "0"}).returncode == 0
        for name in ("saved", "end"):
            (fake.folder / name).touch()
        assert process.wait(timeout=WAIT_S) == RESTARTED


def test_an_earlier_run_s_mark_does_not_end_a_node(fake: Fakes) -> None:
    """Of any number, whether or not node 0 has started already."""
    mark = fake.folder / "runs" / "demo" / "preempted-demo"
    mark.parent.mkdir(parents=True)
    mark.touch()
    assert run(fake, "jobset", launched(fake, "jobset", "--no-preflight")).returncode == 0
    assert mark.exists()


def test_a_run_that_ends_by_itself_is_not_requeued(fake: Fakes) -> None:
    for code in ("0", "1"):
        done = run(fake, "slurm", launched(fake, "slurm", "--no-preflight"), FAKE_CODE=code)
        assert done.returncode == int(code)
    assert not [line for line in fake.said("scontrol") if "requeue" in line]
