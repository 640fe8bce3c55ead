"""Trains under --bf16 through the real entry and prints what became of the scalars in model and optimizer."""

import json
import sys

from megatron_act import cpu_backend

cpu_backend.install()

from megatron.training import training  # noqa: E402

from megatron_act import pretrain_gpt  # noqa: E402
from megatron_act.activation import activations_of  # noqa: E402

original = training.setup_model_and_optimizer
seen = {}


def keep(*args, **kwargs):
    seen["model"], seen["optimizer"], scheduler = original(*args, **kwargs)
    seen["start"] = values()
    return seen["model"], seen["optimizer"], scheduler


def values() -> list[float]:
    return [float(raw) for module in activations_of(seen["model"]) for raw in module.raw_scalars()]


def weight_decay_of_scalars() -> list[float]:
    """The weight decay of every optimizer group that holds a (1,) parameter; such a group must hold nothing else."""
    groups = [g for g in seen["optimizer"].param_groups if any(p.numel() == 1 for p in g["params"])]
    assert all(p.numel() == 1 for group in groups for p in group["params"])
    return [group["weight_decay"] for group in groups]


if __name__ == "__main__":
    training.setup_model_and_optimizer = keep
    pretrain_gpt.main(sys.argv[1:])
    modules = activations_of(seen["model"])
    report = {
        "scalar_dtypes": sorted({str(raw.dtype) for module in modules for raw in module.raw_scalars()}),
        "weight_dtypes": sorted({str(p.dtype) for chunk in seen["model"] for p in chunk.parameters() if p.dim() == 2}),
        "weight_decay": weight_decay_of_scalars(),
        "start": seen["start"],
        "end": values(),
    }
    print("REPORT " + json.dumps(report), flush=True)
