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
from megatron_act.kernels.ops import BLOCK, LAUNCH, WARPS
from megatron_act.kernels.template import bwd_kernel, fwd_kernel

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MAIN = 90  # the capability whose every form is compiled
EXTRAS = ("bias", "value", "bias weights value")
ROWS = 16  # of a program, so that the loop stays a loop


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
    else:
        signature |= {"Y": data, "P": p, "cols": "i32", "n": "i64", "stride": "i32"}
    constants: dict[str, Any] = {
        "FWD": activation.fwd, **({"BWD": activation.bwd} if backward else {}),
        "SOFTPLUS": tuple(q.constrain == "softplus" for q in activation.params),
        "OFFSET": tuple(q.offset for q in activation.params),
        "GATED": gated, "BLOCK": BLOCK, "ROWS": ROWS,
    }  # fmt: skip
    signature |= dict.fromkeys(constants, "constexpr")
    constants |= {k: None for k, t in signature.items() if t == "constexpr" and k not in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t not in ("constexpr", p)}
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


def figures(name: str, kind: str, dtype: str, capability: int, gated: bool = False, extras: str = "") -> dict[str, Any]:
    """What the tests assert of one compiled kernel."""
    compiled = triton.compile(
        source(name, kind, dtype, gated, extras),
        target=GPUTarget("cuda", capability, 32),
        options=LAUNCH,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [DISASSEMBLER, "-res-usage", "-sass", cubin.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sass = [line.strip() for line in listing.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S", line)]
    loop = steady_loop(sass)
    resources = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
    ops = [re.sub(r"^/\*\w+\*/\s+(@!?U?P\d+\s+)?", "", line).split(" ")[0].rstrip(";") for line in sass]
    body = loop or sass  # the compiler unrolls the shortest loops completely
    wide = 2 if dtype == "fp32" else 1  # stores of 16 bytes for a thread's 8 elements
    stores = sum("STG.E.128" in line for line in body) / (wide * (2 if gated and kind == "bwd" else 1))
    elements = stores * BLOCK / (WARPS * 32)  # of a thread in the body
    return {
        "name": name, "kind": kind, "dtype": dtype, "capability": capability, "gated": gated, "extras": extras,
        **resources, "per_element": len(body) / elements,
        "data_loads": sorted({o for line in body for o in re.findall(r"LDG\S*", line)}),
        "data_stores": sorted({o for line in body for o in re.findall(r"STG\S*", line)}),
        "atomics": sorted({o for o in ops if re.match(r"ATOM|RED\b|RED\.|REDG", o)}),
        "local": sorted({o for o in ops if o.startswith(("LDL", "STL"))}),
        "rounding": sorted(set(re.findall(r"(?:cvt|mul|fma)\.\S*bf16\S*", compiled.asm["ptx"]))),
        "ex2_per_element": sum("MUFU.EX2" in line for line in body) / elements,
        "rcp_per_element": sum("MUFU.RCP" in line for line in body) / elements,
    }  # fmt: skip


def main() -> None:
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    capability, both = int(sys.argv[1]), ("fwd", "bwd")
    rows = [figures(name, kind, "bf16", capability) for name in kernels.names() for kind in both]
    rows += [figures(name, kind, "bf16", capability, gated=True) for name in ("xielu", "silu") for kind in both]
    if capability == MAIN:
        rows += [figures("xielu", kind, "bf16", capability, extras=extras) for kind in both for extras in EXTRAS]
        rows += [figures("xielu", kind, dtype, capability) for kind in both for dtype in ("fp32", "fp16")]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
