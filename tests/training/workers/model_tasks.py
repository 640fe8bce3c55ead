"""Tasks on small models, in one process per rank: ``model_tasks.py DEVICE '{"task": {argument: value}, ...}'``.

Rank 0 prints one JSON object with each task's result, or ``{"error": traceback}``: a task that fails keeps none of the
others from running.
"""

import json
import os
import sys
import traceback
from typing import Any

from megatron_act import cpu_backend
from megatron_act.compat import install_typing_override

DEVICE = sys.argv[1]
if DEVICE == "cpu":
    cpu_backend.install()
install_typing_override()

import compiled  # noqa: E402  the backend comes first
import generation  # noqa: E402
import torch  # noqa: E402
import variants  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402

TASKS = {
    "variants": variants.compare,
    "generation": generation.generate,
    "refusals": generation.refusals,
    "compiled": compiled.compare,
    "graphs": compiled.captured,
}


def start() -> None:
    """All ranks of torchrun are tensor parallel; without torchrun there is one."""
    backend, ranks = ("gloo" if DEVICE == "cpu" else "nccl"), int(os.environ.get("WORLD_SIZE", "1"))
    alone = {} if ranks > 1 else {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    if DEVICE != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group(backend, **alone)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    model_parallel_cuda_manual_seed(1)


def attempt(task: str, arguments: dict[str, Any]) -> Any:
    try:
        return TASKS[task](DEVICE, **arguments)
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    start()
    report = {task: attempt(task, arguments) for task, arguments in json.loads(sys.argv[2]).items()}
    if torch.distributed.get_rank() == 0:
        print("REPORT " + json.dumps(report), flush=True)
    torch.distributed.destroy_process_group()
