"""A run that ends well leaves no process group behind: gloo's threads would abort the process as it ends."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_act import pretrain_gpt


@pytest.mark.parametrize(
    ("end", "left"), [(None, True), (SystemExit(), True), (SystemExit(0), True), (SystemExit(1), False)]
)
def test_groups_are_left_where_the_run_ended_well(
    end: SystemExit | None, left: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: Any, **options: Any) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        dist.new_group([0])
        if end is not None:
            raise end

    stand_in = SimpleNamespace(run=run)
    monkeypatch.setitem(sys.modules, "megatron_act.training_run", stand_in)
    monkeypatch.setattr("megatron_act.training_run", stand_in, raising=False)
    try:
        if end is None:
            assert pretrain_gpt.main([]) == 0
        else:
            with pytest.raises(SystemExit):
                pretrain_gpt.main([])
        assert dist.is_initialized() is not left
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
