"""The operators inside PyTorch: torch.compile without graph break or recompilation, checkpointing, autocast."""

import pytest
import torch
from kernel_cases import DEVICE, needs_gpu, shifted_params
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from megatron_act.kernels import api as kernels


def gradients(function, x, params):
    x = x.detach().requires_grad_()
    y = function(x, *params)
    return [y.detach(), *torch.autograd.grad(y, [x, *params], torch.cos(x).detach())]


@pytest.mark.parametrize("name", ["xielu", "relu2"])
def test_compiles_whole_and_once(name):
    torch._dynamo.reset()
    params = shifted_params(name)
    function = lambda x, *p: kernels.apply(name, x, p, backend="triton")  # noqa: E731
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (5, 8, 13):
        x = torch.randn(tokens, 3, 40, generator=torch.Generator().manual_seed(tokens)).to(DEVICE)
        for got, want in zip(gradients(compiled, x, params), gradients(function, x, params), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("marked", [False, True])
def test_token_counts_do_not_recompile(marked):
    """torch.compile's default: the second count makes the dimension dynamic, the others reuse that."""
    torch._dynamo.reset()
    params = [p.detach() for p in shifted_params("xielu")]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: kernels.apply("xielu", x, params, backend="triton"), fullgraph=True, backend=counter
    )
    for tokens in (5, 8, 13, 64, 21):
        x = torch.randn(tokens, 40, device=DEVICE)
        if marked:
            torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), kernels.apply("xielu", x, params, backend="triton"))
    assert counter.frame_count == (1 if marked else 2)


def test_compiles_gated_with_bias_and_weights():
    torch._dynamo.reset()
    x, bias, weights = (torch.randn(s, device=DEVICE) for s in ((6, 40), (40,), (6,)))
    function = lambda x, b, w: kernels.apply("silu", x, bias=b, weights=w, gated=True, backend="triton")  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, bias, weights), function(x, bias, weights))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_activation_checkpointing(backend):
    params = shifted_params("xielu")
    function = lambda x, *p: kernels.apply("xielu", x, p, backend=backend)  # noqa: E731
    again = lambda x, *p: checkpoint(function, x, *p, use_reentrant=False)  # noqa: E731
    x = torch.randn(7, 33, device=DEVICE)
    assert all(
        torch.equal(a, b) for a, b in zip(gradients(again, x, params), gradients(function, x, params), strict=True)
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autocast_changes_nothing(backend):
    params = shifted_params("xielu")
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(7, 33, device=DEVICE).to(dtype)
        plain = kernels.apply("xielu", x, params, backend=backend)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert torch.equal(kernels.apply("xielu", x, params, backend=backend), plain)


def test_only_x_is_saved():
    x, params = torch.randn(64, 64, device=DEVICE, requires_grad=True), shifted_params("xielu")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernels.apply("xielu", x, params, backend="triton")
    assert sorted(t.numel() for t in saved) == [1, 1, x.numel()]
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


@pytest.mark.gpu
@needs_gpu
def test_cuda_graph():
    x, params = torch.randn(128, 1024, device="cuda", dtype=torch.bfloat16), shifted_params("xielu")
    params = [p.detach() for p in params]
    grad = torch.randn_like(x)
    kernels.backward("xielu", grad, x, params)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = kernels.backward("xielu", grad, x, params)
    x.copy_(torch.randn_like(x))
    graph.replay()
    eager = kernels.backward("xielu", grad, x, params)
    assert torch.equal(result.dx, eager.dx) and torch.equal(result.y, eager.y)
    assert all(torch.equal(a, b) for a, b in zip(result.dparams, eager.dparams, strict=True))
