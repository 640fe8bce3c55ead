"""Compiles the FP8 kernels for NVIDIA GPUs without one and reads the machine code; run as a program it prints JSON.

python tests/kernel_fp8_aot.py 90     (TRITON_INTERPRET must be unset)
"""

import json
import math
import re
import sys
from typing import Any

from kernel_aot import disassembled, resources
from triton.compiler import ASTSource

from megatron_act.kernels import api as kernels
from megatron_act.kernels.fp8_launch import BN, CAPABILITY, RECIPES, ROWS
from megatron_act.kernels.quantized import backward_kernel, forward_kernel

MAIN = 90  # the capability for which every activation and every form is compiled
OUT = {
    "plain": ("*bf16",),
    "tensor": ("*u8", "*fp32", "*u8", "*fp32"),
    "blockwise": ("*u8", "*fp32", "*u8", "*fp32", "i32", "i32"),
    "mxfp8": ("*u8", "*u8", "*u8", "*u8", "i32", "i32"),
}
IN = {
    "plain": ("*bf16", "i32"),
    "tensor": ("*u8", "i32", "*fp32"),
    "blockwise": ("*u8", "i32", "*fp32", "i32"),
    "mxfp8": ("*u8", "i32", "*u8", "i32"),
}
FORWARD_FORMS: tuple[dict[str, Any], ...] = ({"bias": True}, {"kept": True}, {"exact": True}, {"tails": True})
BACKWARD_FORMS: tuple[dict[str, Any], ...] = (
    {"bias": True}, {"bias": True, "kept": True, "gradient": True}, {"exact": True}, {"tails": True},
)  # fmt: skip


def case(
    name: str, kind: str, recipe: str, *, bias: bool = False, kept: bool = False, gradient: bool = False,
    exact: bool = False, tails: bool = False, format: str = "e4m3", swizzled: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """kept: written, or read instead of x; gradient: in the recipe, e5m2; exact: not rounded to bf16 first."""
    return locals()


def source(capability: int, row: dict[str, Any]) -> ASTSource:
    """The aligned case in bf16; pointers, counts and strides divisible by 16."""
    activation, recipe, backward = kernels.get(row["name"]), RECIPES[row["recipe"]], row["kind"] == "backward"
    read = "mxfp8" if backward and row["kept"] else "plain"
    grad = row["recipe"] if row["gradient"] else "plain"
    optional = lambda kind, wanted: kind if wanted else "constexpr"  # noqa: E731
    signature: dict[str, Any] = {"X": IN[read], "BIAS": optional("*bf16", row["bias"] and read == "plain")}
    if backward:
        signature["G"] = IN[grad]
    amax = optional("*fp32", row["recipe"] == "tensor" or row["kind"] == "amax")
    signature |= {"P": ("*fp32",) * len(activation.params), "OUT": OUT[row["recipe"]], "AMAX": amax}
    if backward:
        signature |= {"PARTIAL": "*fp32", "DBIAS": optional("*fp32", row["bias"])}
    else:
        signature["KEPT"] = optional(("*u8", "*u8", "i32"), row["kept"])
    signature |= {"rows": "i32", "cols": "i32", "width": "i32"}
    constants: dict[str, Any] = {
        "LOAD": RECIPES[read].load, "STORE": recipe.store, "FORMAT": row["format"], "SWIZZLED": row["swizzled"],
        "SOFTPLUS": tuple(q.constrain == "softplus" for q in activation.params), "WHOLE": not row["tails"],
        "CASTS": "fp8" if (capability // 10, capability % 10) >= CAPABILITY else "bf16", **recipe.constants,
        "ROUND": row["recipe"] != "plain" and not row["exact"],
    }  # fmt: skip
    if backward:
        constants |= {"BWD": activation.bwd, "LOAD_G": RECIPES[grad].load, "FORMAT_G": "e5m2", "SWIZZLED_G": False}
    else:
        constants["FWD"] = activation.fwd
    if row["kind"] == "amax":
        constants["STORE"] = None
        signature["OUT"] = "constexpr"
    signature |= dict.fromkeys(constants, "constexpr")
    constants |= {k: None for k, t in signature.items() if t == "constexpr" and k not in constants}
    return ASTSource(
        fn=backward_kernel if backward else forward_kernel, signature=signature, constexprs=constants,
        attrs=aligned(signature),
    )  # fmt: skip


def aligned(signature: dict[str, Any]) -> dict[tuple[int, ...], Any]:
    found: dict[tuple[int, ...], Any] = {}
    for i, (key, kinds) in enumerate(signature.items()):
        if kinds != "constexpr" and key not in ("P", "width"):
            places = [(i, j) for j in range(len(kinds))] if isinstance(kinds, tuple) else [(i,)]
            found |= {place: [["tt.divisibility", 16]] for place in places}
    return found


def weights(sass: list[str], trips: list[int]) -> list[int]:
    """How often each instruction is executed: loops that read memory, from the outermost, go round ``trips`` times."""
    address = {int(m[1], 16): i for i, line in enumerate(sass) if (m := re.match(r"/\*([0-9a-f]{4,})\*/", line))}
    loops: dict[int, int] = {}
    for i, line in enumerate(sass):
        start = address.get(int(jump[1], 16), i) if (jump := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", line)) else i
        if start < i and any("LDG" in body for body in sass[start:i]):
            loops[start] = i
    inside = [sum(start <= i <= end for start, end in loops.items()) for i in range(len(sass))]
    return [math.prod(trips[:depth]) for depth in inside]


def figures(capability: int, row: dict[str, Any]) -> dict[str, Any]:
    """What the tests assert of one compiled kernel; counts are per element, of executed instructions."""
    recipe = RECIPES[row["recipe"]]
    options = {"num_warps": recipe.warps, "enable_fp_fusion": True}
    compiled, listing = disassembled(source(capability, row), capability, options)
    sass = [line.strip() for line in listing.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S", line)]
    trips = [n for n in (recipe.constants["LOOPS"], recipe.held) if n > 1]
    counted, elements = list(zip(sass, weights(sass, trips), strict=True)), ROWS * BN / (recipe.warps * 32)
    each = lambda pattern: sum(n for line, n in counted if re.search(pattern, line)) / elements  # noqa: E731
    found = lambda pattern, text=listing: sorted(set(re.findall(pattern, text)))  # noqa: E731
    ptx = compiled.asm["ptx"]
    return {
        **row, "capability": capability, **resources(listing),
        "per_element": each("."),
        "stored_bytes": 16 * each(r"STG\.E\.128") + 8 * each(r"STG\.E\.64"),
        "single_bytes": each(r"\bSTG\.E\.U8"), "shared_bytes": each(r"\b(STS|LDS)\.U8"), "turns": each(r"LDSM\S*MT88"),
        "loads": found(r"LDG\.E\S*"), "stores": found(r"STG\.E\S*"), "local": found(r"\b(?:LDL|STL)\S*"),
        "atomics": found(r"\b(?:ATOMG?|REDG?)\.\S+"),
        "fp8_casts": found(r"cvt\.\S*e[45]m[23]x2\.f32", ptx),
        "fp8_reads": found(r"cvt\.\S*\.f16x2\.e[45]m[23]x2", ptx),
        "bf16_casts": found(r"cvt\.\S*bf16(?:x2)?\.f32", ptx),
    }  # fmt: skip


def wanted(capability: int) -> list[dict[str, Any]]:
    kinds = ("forward", "backward")
    if capability < 89:
        return [case("xielu", kind, "plain", kept=True) for kind in kinds]
    if capability == 89:
        return [case("xielu", kind, "tensor", format=f) for kind, f in zip(kinds, ("e4m3", "e5m2"), strict=True)]
    if capability == 100:
        found = [case(name, "backward", "mxfp8", swizzled=True) for name in kernels.names()]
        return [*found, case("xielu", "forward", "mxfp8", swizzled=True)]
    found = [case(name, kind, r) for name in kernels.names() for kind in kinds for r in ("tensor", "blockwise")]
    found += [case("xielu", "forward", r, **form) for r in RECIPES for form in FORWARD_FORMS]
    found += [case("xielu", "backward", r, format="e5m2", **form) for r in RECIPES for form in BACKWARD_FORMS]
    return [*found, case("xielu", "amax", "tensor")]


def main() -> None:
    capability = int(sys.argv[1])
    json.dump([figures(capability, row) for row in wanted(capability)], sys.stdout)


if __name__ == "__main__":
    main()
