"""The preflight's parts that need no second rank: what each check says when what it guards is broken."""

import importlib.metadata
import re
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_act import preflight_software, te
from megatron_act.errors import UserError
from megatron_act.preflight_finding import Finding, caught, failed, merge, report
from megatron_act.preflight_layout import checks

ROOT = Path(__file__).parents[1]
GOOD = {
    "tensor_model_parallel_size": 4,
    "pipeline_model_parallel_size": 2,
    "context_parallel_size": 2,
    "num_attention_heads": 16,
    "group_query_attention": True,
    "num_query_groups": 8,
    "kv_channels": None,
    "hidden_size": 64,
    "ffn_hidden_size": 192,
    "swiglu": False,
    "padded_vocab_size": 1024,
    "fp8": "hybrid",
    "num_layers": 8,
    "num_layers_per_virtual_pipeline_stage": 2,
    "num_virtual_stages_per_pipeline_rank": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "seq_length": 64,
    "sequence_parallel": True,
    "global_batch_size": 24,
    "micro_batch_size": 3,
    "num_experts": 8,
    "expert_model_parallel_size": 4,
    "expert_tensor_parallel_size": 2,
    "moe_ffn_hidden_size": 32,
}
RANKS = 64


def problems(world_size: int = RANKS, **changes: object) -> dict[str, str]:
    findings = checks(Namespace(**{**GOOD, **changes}), world_size)
    return {finding.name: finding.problem for finding in findings if finding.problem}


def test_a_layout_that_divides() -> None:
    findings = checks(Namespace(**GOOD), RANKS)
    assert [finding for finding in findings if finding.problem] == []
    got = {finding.name: finding.got for finding in findings}
    assert got["--ffn-hidden-size by tensor parallel"] == "192 = 4 x 48"
    assert got["--global-batch-size by micro batch x data parallel"] == "24 = 12 x 2"
    assert len(findings) == 17


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (
            {"num_attention_heads": 18, "hidden_size": 576, "num_query_groups": 2},
            ["--num-attention-heads by tensor parallel"],
        ),
        (
            {"num_query_groups": 3},
            ["--num-attention-heads by --num-query-groups", "query groups or tensor parallel by the"],
        ),
        ({"hidden_size": 72}, ["--hidden-size by --num-attention-heads", "--hidden-size by 16 (FP8)"]),
        ({"ffn_hidden_size": 194, "fp8": None}, ["--ffn-hidden-size by tensor parallel"]),
        ({"ffn_hidden_size": 200}, ["--ffn-hidden-size by 16 (FP8) x tensor parallel"]),
        ({"padded_vocab_size": 1026}, ["--padded-vocab-size by tensor parallel"]),
        ({"num_layers": 9}, ["--num-layers by pipeline parallel"]),
        ({"num_layers": 6}, ["layers of a pipeline stage by --num-layers-per-virtual-pipeline-stage"]),
        (
            {"seq_length": 66},
            ["--seq-length by 2 x context parallel", "--seq-length of a context rank by tensor parallel"],
        ),
        ({"global_batch_size": 25}, ["--global-batch-size by micro batch x data parallel"]),
        ({"num_experts": 6}, ["--num-experts by expert parallel"]),
        ({"moe_ffn_hidden_size": 33}, ["--moe-ffn-hidden-size by expert tensor parallel"]),
    ],
)
def test_each_dimension_that_does_not_divide(changes: dict, names: list[str]) -> None:
    found = list(problems(**changes))
    assert len(found) == len(names) and all(name.startswith(part) for name, part in zip(found, names, strict=True))


def test_ranks_that_the_layout_cannot_share() -> None:
    found = problems(world_size=24)
    assert set(found) == {
        "ranks (nodes x GPUs) by tensor x pipeline x context parallel",
        "ranks (nodes x GPUs) by expert x expert tensor x pipeline parallel",
    }
    assert found["ranks (nodes x GPUs) by tensor x pipeline x context parallel"] == (
        "expected a multiple of 16, got 24: change ranks (nodes x GPUs) or tensor x pipeline x context parallel"
    )


def test_megatrons_default_width() -> None:
    assert "--ffn-hidden-size by tensor parallel" not in problems(ffn_hidden_size=None)  # 256
    assert problems(ffn_hidden_size=None, hidden_size=80, fp8=None, swiglu=True) == {}  # 192 of 213


def test_uneven_stages_are_megatrons_to_check() -> None:
    assert problems(num_layers=9, decoder_first_pipeline_num_layers=5, num_layers_per_virtual_pipeline_stage=None) == {}


def test_merging_ranks() -> None:
    same, slow = Finding("torch", "2.13"), Finding("torch", "2.11")
    bad = failed("disk", "room", "none", "free some")
    good = Finding("disk", "room")
    assert merge([[same], [same]]) == [same]
    (different,) = merge([[same], [slow], [same]])
    assert different.problem == (
        "expected the same on all ranks, got 2.13 (ranks 0, 2); 2.11 (rank 1): make the nodes equal"
    )
    assert [item.problem for item in merge([[good], [bad]])] == ["expected room, got none: free some (rank 1)"]
    assert [item.problem for item in merge([[bad], [bad]])] == ["expected room, got none: free some"]
    (many,) = merge([[good]] + [[bad]] * 10)
    assert many.problem.endswith("(ranks 1, 2, 3, 4, 5, 6, 7, 8 and 2 more)")


def test_the_report() -> None:
    text = report([Finding("a", "1"), failed("b", "x", "y\nz", "do"), Finding("long name", "2")])
    assert text.splitlines() == [
        "  a          1",
        "  long name  2",
        "failed: b: expected x, got y z: do",
        "preflight: 2 checks passed, 1 failed",
    ]


def test_a_check_that_raises_is_a_failure() -> None:
    def fail(error: Exception) -> str:
        raise error

    assert caught("x", lambda: "fine") == Finding("x", "fine")
    assert caught("x", lambda: fail(UserError("x: expected a, got b: c"))).problem == "expected a, got b: c"
    assert "got OSError: broken disk" in caught("x", lambda: fail(OSError("broken disk"))).problem


def test_the_matrix_is_setup_pys() -> None:
    text = (ROOT / "setup.py").read_text()
    for name, wanted in preflight_software.SUPPORTED.items():
        assert re.search(rf'"{name}{re.escape(wanted)}[";]', text), name
    assert f'"transformer-engine[pytorch]{preflight_software.ENGINE[1]}"' in text
    assert f'python_requires="{preflight_software.PYTHON}"' in text
    assert te.VERSION == (2, 20)


def test_versions_outside_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.6.0", "triton": "3.7.1", "megatron-core": "0.20.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name])
    found = {item.name: item for item in preflight_software.checks(cpu=True)}
    assert found["torch"].problem == "expected >=2.7, got 2.6.0: pip install 'torch>=2.7'"
    assert found["megatron-core"].problem.startswith("expected >=0.19.2,<0.20, got 0.20.0")
    assert found["triton"].problem == ""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: importlib.metadata.distribution("absent").version)
    assert preflight_software.checks(cpu=True)[1].problem.startswith("expected >=2.7, got none")


def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    (found,) = [item for item in preflight_software.checks(cpu=False) if item.name == "GPUs"]
    assert found.problem.startswith("expected 8 on each node, got 4: ask for")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise AssertionError('imported')")
    return tmp_path


def test_another_projects_apex(package: Path) -> None:
    found = preflight_software.apex()
    assert found.problem.startswith(
        f"expected NVIDIA's (github.com/NVIDIA/apex) or none, got another project at {package}"
    )
    assert "pip uninstall apex" in found.problem


def test_nvidias_apex_and_what_it_turns_on(package: Path) -> None:
    for folder in ("multi_tensor_apply", "optimizers"):
        (package / "apex" / folder).mkdir()
    (package / "apex" / "optimizers" / "fused_adam.py").touch()
    without = "NVIDIA's: fused Adam and fused LayerNorm where Transformer Engine is absent"
    assert preflight_software.apex() == Finding("apex", without)
    (package / f"{preflight_software.GRADIENT_FUSION}.py").touch()
    assert preflight_software.apex() == Finding("apex", f"{without}, gradient accumulation fusion")
