"""The compute match as text: one column for the baseline, one for each matched model."""

from typing import Any

GIB = 1 << 30
STATE = {"weights": "weights, bf16", "gradients": "gradients, fp32", "optimizer": "Adam, fp32"}


def table(reports: list[dict[str, Any]]) -> str:
    """Aligned text from the reports of `Match` with ``state_bytes_per_gpu`` and ``layout``."""
    columns = [_column(reports[0], "baseline_"), *(_column(report, "") for report in reports)]
    labels = list(columns[-1])
    cells = [[label, *(column.get(label, "") for column in columns)] for label in labels]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        row[0].ljust(widths[0]) + "".join(f"  {c.rjust(w)}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _column(report: dict[str, Any], prefix: str) -> dict[str, str]:
    column = {
        "": report[prefix + "activation"] + (" (baseline)" if prefix else ""),
        **{key: _number(report[prefix + key]) for key in ("num_layers", "hidden_size", "ffn_hidden_size")},
        **_parameters(report, prefix),
        **_flops(report, prefix),
        **_bytes(report, prefix),
    }
    if "baseline_tokens" in report:
        column["tokens of equal total FLOPs"] = _number(
            report[prefix + "tokens" if prefix else "tokens_for_equal_flops"]
        )
    if not prefix:
        column["residual of matmul parameters"] = _residual(report, "residual_parameters_percent")
        column["residual of FLOPs per token"] = _residual(report, "residual_flops_percent")
    return column


def _parameters(report: dict[str, Any], prefix: str) -> dict[str, str]:
    return {
        "parameters": _number(report[prefix + "parameters"]),
        "  without embeddings": _number(report[prefix + "parameters_without_embeddings"]),
        "  in matmuls": _number(report[prefix + "matmul_parameters"]),
        "  activation scalars": _number(report[prefix + "activation_scalars"]),
    }


def _flops(report: dict[str, Any], prefix: str) -> dict[str, str]:
    passes = {
        f"  {name}: {part.replace('_', ' ')}": _number(value)
        for name in ("forward", "backward")
        for part, value in report[f"{prefix}flops_per_token_{name}"].items()
    }
    return {
        "FLOPs per token, forward + backward": _number(report[prefix + "flops_per_token"]),
        "  with full attention": _number(report[prefix + "flops_per_token_full_attention"]),
        **passes,
    }


def _bytes(report: dict[str, Any], prefix: str) -> dict[str, str]:
    kept, state = f"{prefix}activation_bytes_per_token_per_layer", report[prefix + "state_bytes_per_gpu"]
    return {
        "activation bytes per token and layer": _number(report[kept]),
        "  activation recomputed": _number(report[kept + "_recompute"]),
        "  pre-activation kept in FP8": _number(report[kept + "_fp8_input"]),
        "model state, GiB per GPU": f"{state['total'] / GIB:.2f}",
        **{f"  {label}": f"{state[name] / GIB:.2f}" for name, label in STATE.items()},
    }


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _residual(report: dict[str, Any], key: str) -> str:
    return f"{report[key]:+.4f} %" if report[key] else "exact"
