"""Shared by all tests: Triton's interpreter where no GPU is, and no skipped test without an allowed reason."""

import os
import signal

import pytest
import torch

# A skip whose reason starts otherwise fails the whole run: nothing may stop being tested unnoticed.
ALLOWED_SKIPS = (
    "no GPU",
    "no Transformer Engine",
    "no NVIDIA DALI",
    "no network namespaces",
    "no lm-eval",
    "data that may not ship",
)

# Two processes take a file each, in this order: minutes first, or one of them would wait for the other at the end.
LONG = (
    *("test_quickstart.py", "test_kernels_precision.py", "test_kernels_compile.py", "test_kernels_fp8_compile.py"),
    *("test_fp8_training.py", "test_faults.py", "test_recompute.py", "test_compare.py", "test_drawn_layouts.py"),
    *("test_experts.py", "test_launch_runs.py", "test_checkpoint_export.py", "test_checkpoint_import.py"),
)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be chosen before triton is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("megatron-act")
    group.addoption(
        "--drawn-cases", type=int, default=40, help="random training configurations to compare with the oracle"
    )
    group.addoption("--full-matrix", action="store_true", help="reshard between all pairs of layouts, not a sample")
    group.addoption("--drawn-log", metavar="FILE", help="write each drawn case, its differences and the coverage here")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as under nohup: what tests start and interrupt inherits it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The interpreter computes both branches of a where in numpy, which warns about the branch not taken.
    for module in ("triton.runtime.interpreter", "numpy._core.fromnumeric"):
        config.addinivalue_line("filterwarnings", f"ignore:.*encountered in:RuntimeWarning:{module}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test (or a whole file) was skipped, without pytest's prefix."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    forbidden = [report for report in skipped if not skip_reason(report).startswith(ALLOWED_SKIPS)]
    for report in forbidden:
        reporter.write_line(f"\nnot an allowed reason to skip: {report.nodeid}: {skip_reason(report)}", red=True)
    if forbidden and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
