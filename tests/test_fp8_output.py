"""The activation hands FP8 to fc2 and to fc1's backward pass: the bits that Transformer Engine's own casts would give.

Each test runs Transformer Engine's own Python in a child process (``te_cpu``), in which torch stands in for its
kernels; those of ``tests/test_te_bits.py`` are the same on a GPU.
"""

import pytest
import torch
from fp8_mlp import BF16, calls, context, counted, kept_bytes, mlp, recipe_of, same, train, watched
from te_cpu.cases import RECIPES
from te_cpu.process import in_engine

from megatron_act.fp8_options import Fp8Options

PLAIN, OUTPUT, GRAD = Fp8Options(), Fp8Options(output=True), Fp8Options(grad=True)
TENSORS = {
    "delayed": "Float8Tensor",
    "tensorwise": "Float8Tensor",
    "blockwise": "Float8BlockwiseQTensor",
    "mxfp8": "MXFP8Tensor",
}


@pytest.mark.parametrize("form", ["E4M3", "HYBRID"])
@pytest.mark.parametrize("name", RECIPES)
@in_engine
def test_training_is_bit_for_bit_that_of_a_bf16_activation(name: str, form: str) -> None:
    """Outputs, gradients of inputs, weights and scalars, scales and histories over three steps of two micro-batches."""
    recipe, options = recipe_of(name, form), {"current": name == "tensorwise"}
    want = train(mlp(PLAIN, **options), recipe)
    module = mlp(OUTPUT, **options)
    with watched(module) as seen:
        got = train(module, recipe)
    assert seen["fc2"] == ["Tensor"] + 5 * [TENSORS[name]]  # the first call: fc2 has no quantizer yet
    same(got, want)
    if name == "delayed":
        assert got["fc2 scaling_fwd scale"][0] != 1.0


@pytest.mark.parametrize("form", ["E4M3", "HYBRID"])
@pytest.mark.parametrize("name", ["delayed", "blockwise", "mxfp8"])
@in_engine
def test_the_gradient_that_fc1_reads_is_bit_for_bit_the_one_that_it_would_make(name: str, form: str) -> None:
    recipe = recipe_of(name, form)
    want = train(mlp(PLAIN), recipe)
    module = mlp(Fp8Options(output=True, grad=True))
    with watched(module) as seen:
        got = train(module, recipe)
    assert seen["fc1"] == 6 * [TENSORS[name]]
    same(got, want)


@pytest.mark.parametrize("activation", ["crrelu", "relu2", "xatlu"])
@in_engine
def test_other_activations_and_a_bias(activation: str) -> None:
    recipe = recipe_of("delayed", "HYBRID")
    options = {"name": activation, "add_bias_linear": True}
    want = train(mlp(PLAIN, **options), recipe)
    module = mlp(Fp8Options(output=True, grad=True), **options)
    with watched(module) as seen:
        got = train(module, recipe)
    assert seen["fc1"][-1] == seen["fc2"][-1] == "Float8Tensor"
    same(got, want)


@pytest.mark.parametrize("name", RECIPES)
@in_engine
def test_the_kernels_fill_the_same_buffers(name: str) -> None:
    """Triton's interpreter in place of torch: buffers, histories and scales that are views; e5m2 gradients."""
    recipe, options = recipe_of(name, "HYBRID"), {"current": name == "tensorwise"}
    fp8 = Fp8Options(output=True, grad=name != "tensorwise")
    want = train(mlp(fp8, **options), recipe, steps=2)
    got = train(mlp(fp8, backend="triton", **options), recipe, steps=2)
    assert got.keys() == want.keys()
    # the interpreter cuts what it stores in bf16 (the first call) where a device rounds: 2 to 3 %
    wrong = {key: error for key in want if (error := ((got[key] - want[key]).norm() / want[key].norm()).item()) > 0.04}
    assert not wrong, wrong


@in_engine
def test_without_its_amax_a_delayed_scale_never_moves() -> None:
    """What the comparison above would notice: the fault that a bypassed quantizer brings."""
    from megatron_act import te_buffers

    recipe = recipe_of("delayed")
    want = train(mlp(PLAIN), recipe)
    original, te_buffers._empty = te_buffers._empty, _without_amax(te_buffers._empty)
    try:
        got = train(mlp(OUTPUT), recipe)
    finally:
        te_buffers._empty = original
    assert not torch.equal(got["fc2 scaling_fwd scale"], want["fc2 scaling_fwd scale"])


def _without_amax(empty):
    from dataclasses import replace

    def made(quantizer, x):
        result, buffers = empty(quantizer, x)
        return result, replace(buffers, amax=None)

    return made


@pytest.mark.parametrize("name", RECIPES)
@in_engine
def test_recomputed_activations_keep_scales_and_histories(name: str) -> None:
    """Activation checkpointing of the whole MLP, by Transformer Engine's own function as Megatron calls it."""
    import transformer_engine.pytorch as te

    recipe, options = recipe_of(name, "HYBRID"), {"current": name == "tensorwise"}
    want = train(mlp(PLAIN, **options), recipe)
    module = mlp(Fp8Options(output=True, grad=name != "tensorwise"), **options)
    with watched(module) as seen:
        got = train(module, recipe, run=lambda x: te.checkpoint(module, x))
    assert seen["fc2"] == 12 * ["Tensor"]  # both passes of six calls
    assert seen["fc1"] == 6 * [TENSORS[name] if name != "tensorwise" else "Tensor"]
    same(got, want)


@pytest.mark.parametrize("name", RECIPES)
@in_engine
def test_a_checkpoint_that_is_not_reentrant_sees_the_same_kinds_of_tensors_twice(name: str) -> None:
    """It matches what both passes save by position: FP8 in one of them only would break it."""
    import transformer_engine.pytorch as te

    recipe, options = recipe_of(name, "HYBRID"), {"current": name == "tensorwise"}
    want = train(mlp(PLAIN, **options), recipe)
    module = mlp(Fp8Options(output=True, grad=name != "tensorwise"), **options)
    same(train(module, recipe, run=lambda x: te.checkpoint(module, x, use_reentrant=False)), want)


@in_engine
def test_calls_that_get_bf16() -> None:
    """No gradients, evaluation, no FP8 context and the first call after it, the first of another recipe and back."""
    seen, _ = calls(mlp(OUTPUT), recipe_of("delayed"), recipe_of("blockwise"))
    assert seen == [*4 * ["Tensor"], "Float8Tensor", "Tensor", "Tensor"]


@in_engine
def test_what_cannot_be_is_bf16_and_said_once() -> None:
    """Reasons that last: one line each, and the results of a bf16 activation."""
    import transformer_engine.pytorch as te

    from megatron_act import fp8_output, once

    said: list[str] = []
    once.log_once.cache_clear()
    original, once.print_rank_0 = once.print_rank_0, said.append
    try:
        module, recipe = mlp(OUTPUT), recipe_of("delayed")
        train(module, recipe, steps=1)
        x = torch.randn(160, 192, dtype=BF16, requires_grad=True)
        with context(recipe):
            fc2 = module.linear_fc2
            for _ in range(2):
                assert fp8_output.quantizer_of(fc2, x, None) is not None
                assert fp8_output.quantizer_of(fc2, x.float(), None) is None
                assert fp8_output.quantizer_of(fc2, x[:7], None) is None
                assert fp8_output.quantizer_of(fc2, x, torch.ones(160)) is None
                assert fp8_output.quantizer_of(torch.nn.Linear(192, 64), x, None) is None
            fc2.te_quant_params = object()
            assert fp8_output.quantizer_of(fc2, x, None) is None
            fc2.te_quant_params = None
            fc2.save_original_input = True
            assert fp8_output.quantizer_of(fc2, x, None) is None
        assert isinstance(fc2, te.Linear)
    finally:
        once.print_rank_0 = original
    reasons = ["bf16 activations, got torch.float32", "divisible by 8", "routed experts", "got Linear", "a recipe of"]
    reasons.append("save_original_input")
    assert len(said) == len(reasons)
    assert [reason for reason, line in zip(reasons, said, strict=True) if reason not in line] == []
    assert all(line.startswith("> megatron-act: --activation-fp8-output: ") for line in said)


KEPT = Fp8Options(store=True)


@pytest.mark.parametrize("bias", [False, True])
@in_engine
def test_a_pre_activation_kept_in_fp8_changes_the_activations_gradients_only_by_its_rounding(bias: bool) -> None:
    """Outputs are the same bits; the gradients are those of the activation at the rounded pre-activation."""
    from megatron_act.kernels import api as kernels
    from megatron_act.kernels import fp8

    recipe, options = recipe_of("delayed", "HYBRID"), {"add_bias_linear": bias}
    want, got = (train(mlp(fp8_options, **options), recipe, steps=1) for fp8_options in (PLAIN, KEPT))
    assert torch.equal(got["y 0.0"], want["y 0.0"])
    assert not torch.equal(got["dx 0.0"], want["dx 0.0"])
    x = torch.randn(160, 192, dtype=BF16, requires_grad=True)
    shift = torch.randn(192, dtype=BF16, requires_grad=True) if bias else None
    module, grad = mlp(KEPT, **options).activation_func, torch.randn(160, 192).to(BF16)
    y = module(x, shift)
    y.backward(grad)
    z = x.detach().float() if shift is None else x.detach().float() + shift.detach().float()
    rounded = fp8.keep(z).values()
    largest = z.abs().unflatten(1, (-1, 32)).amax(2).repeat_interleave(32, 1)
    assert ((rounded - z).abs() <= torch.maximum(2**-4 * z.abs(), 2**-10 / 224 * largest)).all()
    leaves = [rounded.requires_grad_(), *(raw.detach().requires_grad_() for raw in module.raw_scalars())]
    kernels.get("xielu").reference(*leaves).backward(grad.float())
    assert torch.equal(x.grad, leaves[0].grad.to(BF16))
    for raw, leaf in zip(module.raw_scalars(), leaves[1:], strict=True):
        torch.testing.assert_close(raw.grad, leaf.grad, rtol=1e-5, atol=1e-5)


@in_engine
def test_what_is_kept_of_small_values_beside_a_large_one() -> None:
    """2^-4 of a value, or half of e4m3's smallest step, 2^-9, with the largest of the block in (224, 448]."""
    from megatron_act.kernels import fp8

    z = torch.exp2(torch.linspace(-30, 8, 32 * 64)).reshape(64, 32)[:, torch.randperm(32)]
    z = torch.cat([z, z * torch.sign(torch.randn_like(z))])
    for largest in (300.0, 224.5, 3.51, 448.0):
        z[:, 0] = largest
        z = z.clamp(-largest, largest)
        error = (fp8.keep(z).values() - z).abs()
        assert (error <= torch.maximum(2**-4 * z.abs(), torch.tensor(largest * 2**-10 / 224))).all()
        assert (error > 2**-4 * z.abs()).any()


@in_engine
def test_weights_and_fp8_are_refused_together() -> None:
    module = mlp(KEPT).activation_func
    with pytest.raises(ValueError, match="weights: expected none with FP8"):
        module(torch.randn(8, 192), None, torch.ones(8))


@in_engine
def test_another_version_gets_bf16_before_any_of_its_parts_is_asked_for() -> None:
    from megatron_act import te

    module, recipe = mlp(OUTPUT), recipe_of("delayed")
    problem, parts = te.version_problem, te.parts
    te.version_problem, te.parts = lambda: "expected Transformer Engine 2.20, got 2.9", None  # type: ignore[assignment]
    try:
        with watched(module) as seen:
            train(module, recipe)
    finally:
        te.version_problem, te.parts = problem, parts
    assert seen["fc2"] == 6 * ["Tensor"]


@in_engine
def test_everything_at_once_is_what_the_parts_are() -> None:
    """FP8 result and gradient with a kept pre-activation in FP8: the bits of the same with bf16 result and gradient."""
    recipe = recipe_of("delayed", "HYBRID")
    module = mlp(Fp8Options(output=True, grad=True, store=True))
    with watched(module) as seen:
        got = train(module, recipe)
    assert seen["fc2"] == ["Tensor"] + 5 * ["Float8Tensor"] and seen["fc1"] == 6 * ["Float8Tensor"]
    same(got, train(mlp(KEPT), recipe))


@in_engine
def test_memory_that_is_kept_for_the_backward_pass() -> None:
    """Bytes per element of fc1's output that autograd holds between the passes: x and fc2's input."""
    cases = {"plain": PLAIN, "output": OUTPUT, "stored": Fp8Options(output=True, store=True)}
    held, recipe = {}, recipe_of("delayed")
    for label, options in cases.items():
        module = mlp(options)
        train(module, recipe, steps=1)
        held[label] = kept_bytes(module, recipe) / (160 * 192)
    assert held["output"] - held["plain"] == pytest.approx(
        1 - 2, abs=1e-3
    )  # fc2 keeps both halves of what it does not own; torch keeps x in fp32
    assert held["output"] - held["stored"] == pytest.approx(2 - 33 / 32, abs=1e-3)


@pytest.mark.parametrize("name", RECIPES)
@in_engine
def test_the_op_fuser_hands_over_fp8_by_itself(name: str) -> None:
    """te.ops with our operation, bit for bit: what it gives if our operation's results are bf16.

    Also what the unfused MLP gives, but for delayed scaling, whose first scale te.ops takes over a call later
    (Megatron's own fused and unfused MLP differ by as much).
    """
    from megatron_act import te_op

    recipe, options = recipe_of(name, "HYBRID"), {"current": name == "tensorwise"}
    made = counted()
    got = train(mlp(PLAIN, fused=True, **options), recipe)
    assert made == {"forward": 6, "backward": 0 if name == "tensorwise" else 6}
    original, te_op._served = te_op._served, lambda *_, **__: None
    try:
        same(got, train(mlp(PLAIN, fused=True, **options), recipe))
    finally:
        te_op._served = original
    if name != "delayed":
        want = train(mlp(PLAIN, **options), recipe)
        same(got, {key: want[key] for key in got})
