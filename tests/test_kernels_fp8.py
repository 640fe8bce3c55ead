"""FP8 results of the forward kernel against the specification (``kernels/fp8.py``), bit for bit."""

import math

import pytest
import torch
from kernel_cases import DEVICE, needs_gpu
from kernel_fp8_cases import FP8, PARTS, SHAPES, buffers, check, equal, random, raw, special

from megatron_act.kernels import api as kernels
from megatron_act.kernels import fp8, fp8_ops

BOTH = pytest.mark.parametrize("backend", ["triton", "reference"])


@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, "tensor") for name in kernels.names()), ("xielu", "blockwise"), ("xielu", "mxfp8")]
)
def test_forward_equals_the_specification(name, recipe):
    scale = torch.full((1,), 7.5, device=DEVICE)
    for x in (random(*SHAPES[recipe]), special(SHAPES[recipe]), random(*SHAPES[recipe]).to(torch.bfloat16)):
        got = fp8_ops.forward(name, x, raw(name), buffers(recipe, SHAPES[recipe]), scale=scale, backend="triton")
        y = kernels.apply(name, x.float(), raw(name), backend="triton")
        check(got, fp8.quantize(y, recipe, scale))


@pytest.mark.parametrize("recipe", FP8)
def test_forward_in_e5m2(recipe):
    scale = torch.full((1,), 700.0, device=DEVICE)
    x, out = special(SHAPES[recipe]), buffers(recipe, SHAPES[recipe], format="e5m2")
    got = fp8_ops.forward("xielu", x, raw("xielu"), out, scale=scale, backend="triton")
    y = kernels.apply("xielu", x, raw("xielu"), backend="triton")
    check(got, fp8.quantize(y, recipe, scale, format="e5m2"))
    assert (got.data & 0x7F).max() == 0x7F and ((got.data & 0x7F) == 0x7B).any()  # NaN; infinities saturate


@pytest.mark.parametrize("shape", [(160, 96), (256, 128), (32, 480)])
@BOTH
def test_swizzled_scales(shape, backend):
    x, out = random(*shape), buffers("mxfp8", shape, swizzled=True)
    got = fp8_ops.forward("xielu", x, raw("xielu"), out, backend=backend)
    y = kernels.apply("xielu", x, raw("xielu"), backend=backend)
    check(got, fp8.quantize(y, "mxfp8", swizzled=True))


@pytest.mark.parametrize("recipe", FP8)
@pytest.mark.parametrize("round_bf16", [False, True])
@pytest.mark.parametrize("columnwise", [False, True])
def test_forward_with_bias_rows_and_options(recipe, round_bf16, columnwise):
    rows, cols = shape = SHAPES[recipe]
    x, bias, scale = random(rows, cols + 40)[:, 8 : 8 + cols], random(cols, seed=1), torch.tensor(3.0, device=DEVICE)
    options = {"bias": bias, "scale": scale, "round_bf16": round_bf16}
    got, reference = (
        fp8_ops.forward("xielu", x, raw("xielu"), buffers(recipe, shape, columnwise=columnwise), backend=b, **options)
        for b in ("triton", "reference")
    )
    y = kernels.apply("xielu", x, raw("xielu"), bias=bias, backend="triton")
    check(got, fp8.quantize(y, recipe, scale, round_bf16), columnwise)
    differing = (reference.data.int() - got.data.int()).abs()
    assert differing.max() <= 1 and (differing > 0).float().mean() < 1e-3  # y itself may differ by an ulp


@pytest.mark.parametrize("recipe", FP8)
def test_whole_blocks_and_leading_dimensions(recipe):
    """128 x 128 blocks without a rest (the kernel leaves its masks out), x and buffers of three dimensions."""
    x, scale = random(2, 64, 256), torch.ones(1, device=DEVICE)
    out = buffers(recipe, (128, 256))
    out = fp8.Quantized(**{**vars(out), "data": out.data.view(2, 64, 256)})
    got = fp8_ops.forward("relu2", x, [], out, scale=scale, backend="triton")
    want = fp8.quantize(kernels.apply("relu2", x.view(128, 256), backend="triton"), recipe, scale)
    assert equal(got.data.view(128, 256), want.data)
    check(fp8.Quantized(**{**vars(got), "data": got.data.view(128, 256)}), want)


@pytest.mark.parametrize("format", fp8.FORMATS)
@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
def test_scales_at_their_edges(recipe, format):
    """Blocks whose amax lies at, just below and just above the powers where a scale changes, down to subnormals."""
    top = fp8.FORMATS[format].max
    edges = [top * 2.0**k for k in (-140, -130, -126, -8, 0, 7, 100)] + [2.0**k for k in (-149, -127, -119, 0, 127)]
    amax = torch.tensor(edges).repeat_interleave(3)
    amax = torch.cat(
        [torch.nextafter(amax[::3], torch.tensor(0.0)), amax[::3], torch.nextafter(amax[::3], amax[::3] * 2)]
    )
    amax = torch.cat([amax, torch.tensor([0.0, math.inf, math.nan, 3.4e38])]).to(DEVICE)
    x = torch.zeros(64, 32, device=DEVICE)
    x[: len(amax)] = amax[:, None]
    got = fp8_ops.forward("relu", x, [], buffers(recipe, (64, 32), format=format), round_bf16=False, backend="triton")
    check(got, fp8.quantize(x, recipe, round_bf16=False, format=format))


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain_results(backend, dtype):
    """y in a float dtype, rounded once."""
    x, bias = random(*SHAPES["plain"]), random(150, seed=1)
    out = fp8_ops.empty("plain", *SHAPES["plain"], DEVICE, dtype=dtype)
    got = fp8_ops.forward("xielu", x, raw("xielu"), out, bias=bias, backend=backend)
    want = kernels.apply("xielu", x, raw("xielu"), bias=bias, backend=backend)
    assert got is out and got.scale_inv is None
    assert torch.equal(got.data, want.to(dtype))


@BOTH
def test_delayed_scaling_reads_and_writes_views(backend):
    """scale, amax and 1 / scale as Transformer Engine keeps them: elements of larger tensors, whose others stay."""
    x, history, scales, inverses = random(70, 150), torch.zeros(4, 3), torch.full((3,), 2.0), torch.zeros(5)
    history, scales, inverses = history.to(DEVICE), scales.to(DEVICE), inverses.to(DEVICE)
    y = fp8.to_bf16(kernels.apply("xielu", x, raw("xielu"), backend=backend))
    for before in (0.0, 1e6):
        history[0, 1] = before
        made = buffers("tensor", (70, 150))
        out = fp8.Quantized(**{**vars(made), "scale_inv": inverses[3:4], "amax": history[0][1]})
        got = fp8_ops.forward("xielu", x, raw("xielu"), out, scale=scales[1], backend=backend)
        assert history[0, 1].item() == max(before, y.abs().max().item()) and history.count_nonzero() == 1
        assert inverses.tolist() == [0.0, 0.0, 0.0, 0.5, 0.0]
        assert equal(got.data, fp8.quantize(y, "tensor", scales[1]).data)


@BOTH
@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_empty_inputs(backend, recipe):
    """Returned as they are: no kernel runs, an amax keeps its value, gradients of the parameters are zero."""
    out = fp8_ops.empty(recipe, 0, 64, DEVICE)
    if out.amax is not None:
        out.amax.fill_(3.0)
    x, scale, bias = torch.ones(2, 0, 64, device=DEVICE), torch.ones(1, device=DEVICE), torch.ones(64, device=DEVICE)
    assert fp8_ops.forward("xielu", x, raw("xielu"), out, scale=scale, backend=backend) is out
    got, dparams, dbias = fp8_ops.backward("xielu", x, x, raw("xielu"), out, scale=scale, bias=bias, backend=backend)
    assert got is out and (out.amax is None or out.amax.item() == 3.0)
    assert [p.tolist() for p in dparams] == [[0.0], [0.0]] and dbias.tolist() == [0.0] * 64
    assert fp8_ops.current_scale("xielu", x, raw("xielu"), backend=backend).item() == 1.0


@BOTH
@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("format", fp8.FORMATS)
def test_current_scale(backend, power_of_2, format):
    x, bias = random(70, 150), random(150, seed=5)
    y = fp8.to_bf16(kernels.apply("crrelu", x, raw("crrelu"), bias=bias, backend=backend))
    options = {"bias": bias, "backend": backend}
    got = fp8_ops.current_scale("crrelu", x, raw("crrelu"), power_of_2=power_of_2, format=format, **options)
    assert got.item() == fp8.scale_of(y.abs().max(), power_of_2, format=format).item()
    out = buffers("tensor", (70, 150), format=format)
    made = fp8_ops.forward("crrelu", x, raw("crrelu"), out, scale=got, **options)
    top, step = fp8.FORMATS[format].top, 1 << fp8.FORMATS[format].mantissa
    largest = int((made.data & 0x7F).max())
    assert largest == top if not power_of_2 else top - step <= largest <= top  # the maximum, or above half of it


@needs_gpu
@pytest.mark.parametrize("recipe", fp8.RECIPES)
def test_nothing_waits_for_the_device(recipe):
    x, scale = random(160, 96).bfloat16(), torch.ones(1, device=DEVICE)
    out, dx = (fp8_ops.empty(recipe, 160, 96, x.device) for _ in range(2))
    for warm in (True, False):  # compiling may wait
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        try:
            fp8_ops.current_scale("xielu", x, raw("xielu"))
            fp8_ops.forward("xielu", x, raw("xielu"), out, scale=scale)
            fp8_ops.backward("xielu", x, x, raw("xielu"), dx, scale=scale, bias=x[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert equal(out.data.float(), fp8_ops.forward("xielu", x, raw("xielu"), out, scale=scale).data.float())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"recipe": "nvfp4"}, ["nvfp4", "not built", "mxfp8"]),
        ({"recipe": "fp8"}, ["plain, tensor, blockwise, mxfp8", "'fp8'"]),
        ({"recipe": "tensor", "format": "e3m4"}, ["e4m3, e5m2", "'e3m4'"]),
        ({"recipe": "mxfp8", "rows": 33}, ["divisible by 32", "[33, 64]"]),
        ({"recipe": "tensor", "swizzled": True}, ["swizzled", "mxfp8", "tensor"]),
    ],
)
def test_buffers_that_are_refused(options, parts):
    given = {"rows": 64, "cols": 64, "device": "cpu", **options}
    with pytest.raises(ValueError) as error:
        fp8_ops.empty(**given)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"out": "tensor"}, ["scale", "None"]),
        ({"out": "tensor", "scale": torch.ones(2)}, ["scale", "float32 of 2"]),
        ({"backend": "cuda"}, ["auto, triton, reference", "'cuda'"]),
        ({"params": [torch.ones(1)]}, ["expected 2 parameters"]),
        ({"x": torch.ones(64, 32)}, ["out.data", "2048", "4096", "fp8_ops.empty"]),
        ({"part": ("columnwise", torch.ones(64, 64, dtype=torch.uint8).T[:, ::2])}, ["out.columnwise", "2048"]),
        ({"part": ("data", torch.ones(64, 64, dtype=torch.uint8).T)}, ["out.data", "contiguous", "strides"]),
        ({"part": ("scale_inv", None)}, ["out.scale_inv", "None"]),
        ({"part": ("recipe", "plain")}, ["out.data", "uint8", "name its recipe"]),
        ({"part": ("amax", torch.ones(1))}, ["out.amax", "expected None"]),
        ({"part": ("scale_inv", torch.ones(64, dtype=torch.float64))}, ["out.scale_inv", "float64"]),
        ({"kept": fp8_ops.empty_kept(64, 32, "cpu")}, ["kept.data", "2048"]),
    ],
)
def test_calls_that_are_refused(change, parts):
    given = {"x": torch.ones(64, 64), "params": [torch.ones(1)] * 2, "out": "blockwise", **change}
    out = fp8_ops.empty(given.pop("out"), 64, 64, "cpu")
    if "part" in given:
        name, value = given.pop("part")
        out = fp8.Quantized(**{**vars(out), name: value})
    with pytest.raises(ValueError) as error:
        fp8_ops.forward("xielu", given.pop("x"), given.pop("params"), out, **given)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize(("capability", "recipe", "casts"), [((8, 0), "plain", "bf16"), ((8, 9), "tensor", "fp8")])
def test_old_gpus_serve_plain_results_only(monkeypatch, capability, recipe, casts):
    """FP8 for a GEMM needs 8.9; everything else, kept pre-activations too, rounds by integers on older ones."""
    from megatron_act.kernels import fp8_launch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fp8_launch, "INTERPRETED", False)
    monkeypatch.setattr(fp8_ops, "check_triton", lambda x: None)

    class Cuda:
        is_cuda, dtype, device = True, torch.bfloat16, "cuda"

    assert fp8_launch.casts_of(torch.device("cpu")) == casts
    assert fp8_ops._triton(Cuda(), "auto", recipe)
    if capability < (8, 9):
        with pytest.raises(
            ValueError, match=r"'mxfp8': expected compute capability 8.9 or newer, got 8.0; use 'plain'"
        ):
            fp8_ops._triton(Cuda(), "auto", "mxfp8")


def test_every_part_is_listed():
    assert set(PARTS) | {"recipe", "format", "swizzled"} == set(fp8.Quantized.__dataclass_fields__)
