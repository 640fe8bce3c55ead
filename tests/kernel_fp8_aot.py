"""Compiles the FP8 kernels for GPUs that have e4m3, without one; run as a program it prints JSON.

python tests/kernel_fp8_aot.py 89 90 100     (TRITON_INTERPRET must be unset)
"""

import json
import re
import sys
from typing import Any

from kernel_aot import disassembled, resources
from triton.compiler import ASTSource

from megatron_act.kernels import api as kernels
from megatron_act.kernels.fp8_ops import EXACT_CASTS, STORES, TILES, WARPS
from megatron_act.kernels.quantized import amax_kernel, backward_kernel, forward_kernel

OUT = {
    "tensor": ("*u8", "*u8", "*fp32", "*fp32"),
    "blockwise": ("*u8", "*fp32", "*u8", "*fp32", "i32", "i32"),
    "mxfp8": ("*u8", "*u8", "*u8", "*u8", "i32", "i32"),
}
KERNELS = {"forward": forward_kernel, "backward": backward_kernel, "amax": amax_kernel}


def source(name: str, kind: str, recipe: str, exact: bool) -> ASTSource:
    """The aligned case in bf16, without bias; pointers, counts and strides divisible by 16."""
    activation, sizes = kernels.get(name), dict.fromkeys(("rows", "cols"), "i32")
    p, out = ("*fp32",) * len(activation.params), OUT[recipe]
    signature: dict[str, Any] = {"X": "*bf16", "BIAS": "constexpr"}
    if kind == "backward":
        signature |= {"G": "*bf16", "G_SCALE_INV": "constexpr", "P": p, "OUT": out, "PARTIAL": "*fp32"}
        signature |= {"DBIAS": "constexpr", **sizes, "stride_x": "i32", "stride_g": "i32", "BWD": "constexpr"}
    else:
        result = {"AMAX": "*fp32"} if kind == "amax" else {"OUT": out}
        signature |= {"P": p, **result, **sizes, "stride": "i32", "FWD": "constexpr"}
    constants: dict[str, Any] = {
        "SOFTPLUS": tuple(q.constrain == "softplus" for q in activation.params),
        "ROUND": True, "EXACT": exact, "TILE": TILES[recipe], "FWD": activation.fwd, "BWD": activation.bwd,
    }  # fmt: skip
    if kind != "amax":
        constants["STORE"] = STORES[recipe]
    constants = {k: v for k, v in constants.items() if k not in ("FWD", "BWD") or k in signature}
    signature |= dict.fromkeys(constants, "constexpr")
    constants |= {k: None for k, t in signature.items() if t == "constexpr" and k not in constants}
    aligned: dict[tuple[int, ...], Any] = {}
    for i, (key, kinds) in enumerate(signature.items()):
        if kinds != "constexpr" and key != "P":
            places = [(i, j) for j in range(len(kinds))] if isinstance(kinds, tuple) else [(i,)]
            aligned |= {place: [["tt.divisibility", 16]] for place in places}
    return ASTSource(fn=KERNELS[kind], signature=signature, constexprs=constants, attrs=aligned)


def figures(name: str, kind: str, recipe: str, capability: int) -> dict[str, Any]:
    compiled, listing = disassembled(
        source(name, kind, recipe, (capability // 10, capability % 10) < EXACT_CASTS),
        capability,
        {"num_warps": WARPS, "enable_fp_fusion": True},
    )
    return {
        "name": name, "kind": kind, "recipe": recipe, "capability": capability, **resources(listing),
        "loads": sorted(set(re.findall(r"LDG\.E\.\d+", listing))),
        "stores": sorted(set(re.findall(r"STG\.E\.\d+", listing))),
        "atomics": sorted(set(re.findall(r"(?:ATOMG|RED)\.\S+", listing))),
        "casts": sorted(set(re.findall(r"cvt\.\S*e4m3\S*", compiled.asm["ptx"]))),
        "bf16": sorted(set(re.findall(r"cvt\.\S*bf16x?2?\.f32", compiled.asm["ptx"]))),
    }  # fmt: skip


def main() -> None:
    kinds = [("xielu", kind, recipe) for recipe in STORES for kind in ("forward", "backward")]
    kinds += [("xielu", "amax", "tensor"), ("relu2", "forward", "tensor"), ("xiprelup", "backward", "tensor")]
    json.dump([figures(*kind, int(capability)) for capability in sys.argv[1:] for kind in kinds], sys.stdout)


if __name__ == "__main__":
    main()
