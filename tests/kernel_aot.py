"""Compiles the template for NVIDIA GPUs without one and reads the machine code back; run as a program it prints JSON.

python tests/kernel_aot.py 90     (TRITON_INTERPRET must be unset)
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_act.kernels import api as kernels
from megatron_act.kernels.ops import BACKWARD_ROWS, BLOCK, FORWARD_ROWS, LAUNCH, SUM_BLOCK, SUM_WARPS, WARPS
from megatron_act.kernels.template import bwd_kernel, fwd_kernel, sum_kernel

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MAIN = 90  # the capability whose every form is compiled
GATED = ("xielu", "silu", "gelu")  # xielu-glu, SwiGLU, GeGLU
FORMS = ("", "bias", "value", "weights")  # of every activation; value is the backward pass's


def source(name: str, kind: str, dtype: str, gated: bool, extras: str) -> ASTSource:
    """The aligned case: pointers, counts and strides divisible by 16. extras: any of bias, weights, value."""
    activation, backward = kernels.get(name), kind == "bwd"
    data, fp32 = f"*{dtype}", "*fp32"
    optional = lambda t, key: t if key in extras else "constexpr"  # noqa: E731
    p = tuple(fp32 for _ in activation.params)
    signature: dict[str, Any] = {"X": data, "BIAS": optional(data, "bias"), "W": optional(fp32, "weights")}
    if backward:
        signature |= {
            "G": data,
            "DX": data,
            "Y": optional(data, "value"),
            "P": p,
            "PARTIAL": fp32,
            "DBIAS": optional(fp32, "bias"),
        }
        signature |= {"DW": optional(fp32, "weights"), "cols": "i32", "n": "i64", "stride_x": "i32", "stride_g": "i32"}
        signature |= {"width": "i32"}
    else:
        signature |= {"Y": data, "P": p, "cols": "i32", "n": "i64", "stride": "i32", "width": "i32"}
    constants: dict[str, Any] = {
        "FWD": activation.fwd, **({"BWD": activation.bwd} if backward else {}),
        "SOFTPLUS": tuple(q.constrain == "softplus" for q in activation.params),
        "GATED": gated, "BLOCK": BLOCK,
        "ROWS": BACKWARD_ROWS if backward else FORWARD_ROWS,
    }  # fmt: skip
    signature |= dict.fromkeys(constants, "constexpr")
    constants |= {k: None for k, t in signature.items() if t == "constexpr" and k not in constants}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (k, t) in enumerate(signature.items())
        if t not in ("constexpr", p) and k != "width"
    }
    return ASTSource(
        fn=bwd_kernel if backward else fwd_kernel, signature=signature, constexprs=constants, attrs=aligned
    )


def steady_loop(sass: list[str]) -> list[str]:
    """The instructions of the innermost backward branch with the most loads: the loop over rows."""
    address = {int(m[1], 16): i for i, line in enumerate(sass) if (m := re.match(r"/\*([0-9a-f]{4,})\*/", line))}
    best: list[str] = []
    for i, line in enumerate(sass):
        if (jump := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", line)) and (start := address.get(int(jump[1], 16), i)) < i:
            body = sass[start : i + 1]
            if sum("LDG" in b for b in body) > sum("LDG" in b for b in best):
                best = body
    return best


def disassembled(source: ASTSource, capability: int, options: dict[str, Any]) -> tuple[Any, str]:
    """(the compiled kernel, cuobjdump's resource usage and SASS)"""
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [DISASSEMBLER, "-res-usage", "-sass", cubin.name]
        return compiled, subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(listing: str) -> dict[str, int]:
    return {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}


def sum_figures(capability: int) -> dict[str, Any]:
    """The second stage of the parameters' gradients, for three softplus parameters."""
    p = ("*fp32",) * 3
    signature = {"PARTIAL": "*fp32", "P": p, "OUT": p, "count": "i32", "SOFTPLUS": "constexpr", "BLOCK": "constexpr"}
    constants = {"SOFTPLUS": (True,) * 3, "BLOCK": SUM_BLOCK}
    source = ASTSource(fn=sum_kernel, signature=signature, constexprs=constants)
    listing = disassembled(source, capability, {"num_warps": SUM_WARPS})[1]
    return {"capability": capability, "atomics": re.findall(r"ATOM\S*|RED\.\S*|REDG\S*", listing), **resources(listing)}


def figures(name: str, kind: str, dtype: str, capability: int, gated: bool = False, extras: str = "") -> dict[str, Any]:
    """What the tests assert of one compiled kernel."""
    compiled, listing = disassembled(source(name, kind, dtype, gated, extras), capability, LAUNCH)
    sass = [line.strip() for line in listing.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S", line)]
    loop = steady_loop(sass)
    ops = [re.sub(r"^/\*\w+\*/\s+(@!?U?P\d+\s+)?", "", line).split(" ")[0].rstrip(";") for line in sass]
    body = loop or sass  # the compiler unrolls the shortest loops completely
    wide = 2 if dtype == "fp32" else 1  # stores of 16 bytes for a thread's 8 elements
    results = 1 + (kind == "bwd" and gated) + (kind == "bwd" and "value" in extras)
    elements = sum("STG.E.128" in line for line in body) / (wide * results) * BLOCK / (WARPS * 32)  # a thread's
    return {
        "name": name, "kind": kind, "dtype": dtype, "capability": capability, "gated": gated, "extras": extras,
        **resources(listing), "per_element": len(body) / elements,
        "data_loads": sorted({o for line in body for o in re.findall(r"LDG\S*", line)}),
        "data_stores": sorted({o for line in body for o in re.findall(r"STG\S*", line)}),
        "atomics": sorted({o for o in ops if re.match(r"ATOM|RED\b|RED\.|REDG", o)}),
        "shared": sorted({o for line in body for o in re.findall(r"\b(?:STS|LDS|BAR)\b", line)}),
        "local": sorted({o for o in ops if o.startswith(("LDL", "STL"))}),
        "rounding": sorted(set(re.findall(r"(?:cvt|mul|fma)\.\S*bf16\S*", compiled.asm["ptx"]))),
        "xu_per_element": sum(bool(re.search(r"MUFU|I2F\.|F2I|FRND", line)) for line in body) / elements,
    }  # fmt: skip


def wanted(capability: int) -> list[dict[str, Any]]:
    """Arguments of :func:`figures`: every form of every activation on one GPU, the plain ones and value on all."""
    forms = FORMS if capability == MAIN else ("", "value")
    rows = [{"name": n, "kind": k, "extras": e} for n in kernels.names() for k in ("fwd", "bwd") for e in forms]
    rows += [{"name": n, "kind": k, "extras": e, "gated": True} for n in GATED for k in ("fwd", "bwd") for e in forms]
    if capability == MAIN:
        rest = [{"dtype": "fp32"}, {"dtype": "fp16"}, {"extras": "bias weights value"}]
        rest += [{"gated": True, "extras": "bias weights value"}]
        rows += [{"name": "xielu", "kind": k, **form} for k in ("fwd", "bwd") for form in rest]
    return [{"dtype": "bf16", **r} for r in rows if r["kind"] == "bwd" or r.get("extras") != "value"]


def main() -> None:
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    capability = int(sys.argv[1])
    rows = [figures(**row, capability=capability) for row in wanted(capability)]
    json.dump({"kernels": rows, "sum": sum_figures(capability)}, sys.stdout)


if __name__ == "__main__":
    main()
