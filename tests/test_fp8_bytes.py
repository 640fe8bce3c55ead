"""The bytes that FP8 recipes move: counted by hand, in tensors, and in what the kernels load and store."""

from fractions import Fraction

import pytest
import torch
from triton.runtime import interpreter

from megatron_act import fp8_bytes, te
from megatron_act.fp8_bytes import ENGINE, OURS, UNFUSED
from megatron_act.kernels import api as kernels
from megatron_act.kernels import fp8_ops
from megatron_act.kernels.ops import INTERPRETED

SCALES = 2 * 4 / 128  # of both halves, as fp32 for 128 elements or one byte for 32
STORES = {"delayed": "tensor", "tensorwise": "tensor", "blockwise": "blockwise", "mxfp8": "mxfp8"}
SHAPE = (256, 384)  # whole blocks and tiles: no padding


@pytest.mark.parametrize(
    ("recipe", "transposed", "forward", "backward"),
    [  # read bf16 + write bf16, then read + write FP8, ...:   unfused, Transformer Engine's, ours
        ("delayed", True, (2 + 2 + 2 + 2, 2 + 2, 2 + 2), (4 + 2 + 2 + 2, 4 + 2, 4 + 2)),
        ("delayed", False, (2 + 2 + 2 + 1, 2 + 1, 2 + 1), (4 + 2 + 2 + 1, 4 + 1, 4 + 1)),
        ("tensorwise", True, (2 + 2 + 2 + 2 + 2, 2 + 2 + 2 + 2, 2 + 2 + 2), (4 + 2 + 2 + 2 + 2, 10, 4 + 4 + 2)),
        ("tensorwise", False, (2 + 2 + 2 + 2 + 1, 2 + 2 + 2 + 1, 2 + 2 + 1), (4 + 2 + 2 + 2 + 1, 9, 4 + 4 + 1)),
        ("blockwise", True, (8 + SCALES, 8 + SCALES, 4 + SCALES), (10 + SCALES, 10 + SCALES, 6 + SCALES)),
        ("blockwise", False, (8 + SCALES, 8 + SCALES, 4 + SCALES), (10 + SCALES, 10 + SCALES, 6 + SCALES)),
        ("mxfp8", False, (8 + SCALES, 4 + SCALES, 4 + SCALES), (10 + SCALES, 6 + SCALES, 6 + SCALES)),
    ],
)
def test_bytes_counted_by_hand(recipe, transposed, forward, backward):
    for op, wanted in (("forward", forward), ("backward", backward)):
        found = [fp8_bytes.moved(recipe, way, op, transposed=transposed) for way in (UNFUSED, ENGINE, OURS)]
        assert found == list(wanted)
        assert fp8_bytes.ratio(recipe, op, transposed) == Fraction(wanted[0]) / Fraction(wanted[2])


def test_the_most_that_fusing_can_gain():
    """2.5 times, which unfused current scaling over fused delayed scaling would be, is no recipe's ratio."""
    ratios = {(recipe, t): fp8_bytes.ratio(recipe, "forward", t) for recipe in STORES for t in (True, False)}
    assert ratios["delayed", True] == 2 and ratios["tensorwise", True] == Fraction(5, 3)
    assert max(ratios.values()) == ratios["delayed", False] == Fraction(7, 3)


@pytest.mark.parametrize(
    ("recipe", "options", "wanted"),
    [
        (None, {}, 2 + 2),
        (None, {"stored": True}, 1 + 4 / 128 + 2),
        ("delayed", {}, 2 + 1),
        ("delayed", {"handed_over": True}, 2 + 1 + 1),
        ("delayed", {"handed_over": True, "transposed": False}, 2 + 1),
        ("delayed", {"handed_over": True, "stored": True}, 1 + 4 / 128 + 1 + 1),
        ("blockwise", {}, 2 + 1 + 4 / 128),
        ("mxfp8", {"handed_over": True}, 2 + 1 + 1 + SCALES),
    ],
)
def test_bytes_kept(recipe, options, wanted):
    assert fp8_bytes.kept(recipe, **options) == wanted


def test_only_our_kernels_keep_x_in_fp8():
    assert fp8_bytes.moved("delayed", OURS, "forward", stored=True) == 2 + 2 + fp8_bytes.STORED
    assert fp8_bytes.moved("delayed", OURS, "backward", stored=True) == 2 + fp8_bytes.STORED + 2
    with pytest.raises(ValueError, match="only our kernels"):
        fp8_bytes.moved("delayed", UNFUSED, "forward", stored=True)


def test_gpus():
    assert set(fp8_bytes.SCALE) == set(te.CAPABILITIES)
    assert [fp8_bytes.transposes(c) for c in ((8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (13, 0))] == [
        True, True, False, False, True, False,
    ]  # fmt: skip
    rows = [line.split("|")[1].strip() for line in fp8_bytes.table().splitlines()[2:]]
    assert rows == [
        "delayed, 8.9 9.0 12.x", "delayed, 10.x", "tensorwise, 8.9 9.0 12.x", "tensorwise, 10.x",
        "blockwise, 9.0 10.x 12.x", "mxfp8, 10.x",
    ]  # fmt: skip


def inputs():
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(SHAPE, generator=generator).bfloat16() for _ in range(2))
    return x, grad, [torch.tensor([p.raw_init]) for p in kernels.get("xielu").params]


def buffers(recipe, transposed=True):
    columnwise = transposed or STORES[recipe] != "tensor"
    return fp8_ops.empty(STORES[recipe], *SHAPE, torch.device("cpu"), columnwise=columnwise)


def size(*tensors):
    """Bytes; scales and largest values of a whole tensor are not counted."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None and tensor.numel() > 1)


def parts(quantized):
    names = ("data", "scale_inv", "columnwise", "columnwise_scale_inv", "amax")
    return [getattr(quantized, name) for name in names]


@pytest.mark.parametrize("recipe", STORES)
@pytest.mark.parametrize("transposed", [True, False])
def test_bytes_of_tensors(recipe, transposed):
    """What each pass is given and returns, with y as a bf16 activation returns it."""
    x, grad, raw = inputs()
    out = buffers(recipe, transposed)
    y = kernels.apply("xielu", x, raw, backend="reference")
    for op in fp8_bytes.OPS:
        given, wide = ([x], y) if op == "forward" else ([x, grad], grad)
        if op == "forward":
            made = fp8_ops.forward("xielu", x, raw, out, scale=torch.ones(1))
        else:
            made = fp8_ops.backward("xielu", grad, x, raw, out, scale=torch.ones(1))[0]
        scans = recipe == "tensorwise"
        ours = size(*given) * (1 + scans) + size(*parts(made))
        unfused = size(*given, wide) + size(wide) * (1 + scans) + size(*parts(made))
        for way, total in ((OURS, ours), (UNFUSED, unfused)):
            assert fp8_bytes.moved(recipe, way, op, transposed=transposed) * x.numel() == total, (op, way)


@pytest.fixture
def traffic(monkeypatch):
    """Bytes that kernels load and store in Triton's interpreter; scalars are not counted."""
    if not INTERPRETED:
        pytest.skip("no GPU counts them: they are read from Triton's interpreter")
    counted = []
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(pointers, mask):
        if pointers.data.size > 1:
            counted.append(int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8)

    def counted_load(self, pointers, mask, *rest):
        count(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    return counted


@pytest.mark.parametrize("recipe", STORES)
def test_bytes_that_the_kernels_load_and_store(recipe, traffic):
    x, _, raw = inputs()
    scale = torch.ones(1)
    if recipe == "tensorwise":
        scale = fp8_ops.current_scale("xielu", x, raw, backend="triton")
    fp8_ops.forward("xielu", x, raw, buffers(recipe), scale=scale, backend="triton")
    assert sum(traffic) == fp8_bytes.moved(recipe, OURS, "forward") * x.numel()


def test_bytes_with_x_kept_in_fp8(traffic):
    x, grad, _ = inputs()
    kept = fp8_ops.empty_kept(*SHAPE, torch.device("cpu"))
    options = {"scale": torch.ones(1), "backend": "triton"}
    fp8_ops.forward("relu2", x, [], buffers("delayed"), kept=kept, **options)
    assert sum(traffic) == fp8_bytes.moved("delayed", OURS, "forward", stored=True) * x.numel()
    traffic.clear()
    fp8_ops.backward("relu2", grad, kept, [], buffers("delayed"), **options)
    assert sum(traffic) == fp8_bytes.moved("delayed", OURS, "backward", stored=True) * x.numel()
    assert size(kept.data, kept.scales) == fp8_bytes.STORED * x.numel()


@pytest.mark.parametrize("recipe", [name for name in STORES if name != "tensorwise"])
def test_bytes_of_the_backward_kernels(recipe, traffic):
    x, grad, _ = inputs()
    out = buffers(recipe)
    fp8_ops.backward("relu2", grad, x, [], out, scale=torch.ones(1), backend="triton")  # no sums of scalars
    assert sum(traffic) == fp8_bytes.moved(recipe, OURS, "backward") * x.numel()
