"""The entry point with the reduction of the scalars' gradients changed: ``prepare`` of a forked run.

``reductions.py [flags]``: an entry point of Megatron-LM's style, whose sum in the backward pass is lost.
"""

import runpy
from pathlib import Path

from megatron_act import cpu_backend

cpu_backend.install()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from megatron_act import activation, finalize, replicas  # noqa: E402
from megatron_act.activation import activations_of  # noqa: E402
from megatron_act.parallel import sum_main_gradients  # noqa: E402

installed = finalize.install


def backward(models):
    """The default mechanism in place of the finalize hook's."""
    models = installed(models)
    for module in activations_of(models):
        module.sums_in_backward = True
    return models


def both(models):
    """The sum in the backward pass stays on beside the one in the finalize hook."""
    finalize.sum_main_gradients = lambda modules: sum_main_gradients(activations_of(models))
    return backward(models)


def marked(models):
    """Megatron is told to sum the scalars as well, as it does for norms under sequence parallelism."""
    for module in activations_of(models):
        for raw in module.raw_scalars():
            raw.sequence_parallel = True
    return installed(models)


def drift(models):
    """One rank's scalar moves by itself after the checks of the first steps."""
    if parallel_state.get_tensor_model_parallel_rank() == 1:
        check = replicas.check_values

        def check_late(wrapped):
            if models[0].drifts:
                activations_of(models)[2].alpha_n.data += 1e-3
            check(wrapped)

        replicas.check_values = check_late
    models = installed(models)
    models[0].drifts = False
    finalize_all = finalize.Finalize.__call__

    def count(self, *args, **kwargs):
        finalize_all(self, *args, **kwargs)
        models[0].drifts = self.calls >= finalize.VALUE_CHECKS

    finalize.Finalize.__call__ = count
    return models


def none(modules):
    """The sum that should follow Megatron's reductions is lost."""


def average(modules):
    """The mean over the ranks in place of their sum."""
    sum_main_gradients(modules)
    for module in modules:
        for raw in module.raw_scalars():
            raw.main_grad /= module.tp_group.size()


def wrong_group(modules):
    """The sum runs over the data-parallel ranks."""
    for module in modules:
        for raw in module.raw_scalars():
            torch.distributed.all_reduce(raw.main_grad, group=parallel_state.get_data_parallel_group())


SUMS = {"none": none, "average": average, "wrong_group": wrong_group}
HOOKS = {"backward": backward, "both": both, "marked": marked, "drift": drift}


def prepare(variant):
    """Before the entry point starts."""
    finalize.sum_main_gradients = SUMS.get(variant, sum_main_gradients)
    finalize.install = HOOKS.get(variant, installed)


if __name__ == "__main__":
    activation.sum_gradients_over_group = lambda scalars, group: tuple(scalars)
    runpy.run_path(str(Path(__file__).parent / "megatron_lm_entry.py"), run_name="__main__")
