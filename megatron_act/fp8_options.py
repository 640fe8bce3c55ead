"""What of the activation is in FP8: three flags, and what cannot go with them."""

from dataclasses import dataclass
from typing import Any

OUTPUT_FLAG = "--activation-fp8-output"
GRAD_FLAG = "--activation-fp8-grad"
STORE_FLAG = "--activation-fp8-input-store"


@dataclass(frozen=True)
class Fp8Options:
    """Which tensors of the activation are in FP8.

    Attributes:
        output: its result, as fc2's input.
        grad: its input's gradient, as the gradient that fc1 reads.
        store: what it keeps for the backward pass.
    """

    output: bool = False
    grad: bool = False
    store: bool = False

    @classmethod
    def of(cls, args: Any) -> "Fp8Options":
        """From Megatron's parsed arguments with this project's flags."""
        return cls(args.activation_fp8_output, args.activation_fp8_grad, args.activation_fp8_input_store)

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags that are on."""
        given = {OUTPUT_FLAG: self.output, GRAD_FLAG: self.grad, STORE_FLAG: self.store}
        return tuple(flag for flag, on in given.items() if on)

    def conflict(self, settings: Any) -> str | None:
        """Why these cannot go with a configuration: one sentence with the flag to change, or None.

        Args:
            settings: Megatron's parsed arguments or a TransformerConfig.
        """
        fp8 = getattr(settings, "fp8", None)
        experts = getattr(settings, "num_experts", None) or getattr(settings, "num_moe_experts", None)
        offload = getattr(settings, "cpu_offloading", False) or getattr(settings, "cpu_offloading_num_layers", 0)
        fuser = getattr(settings, "use_transformer_engine_op_fuser", False)
        for flag in self.flags:
            problems = (
                (
                    flag != STORE_FLAG and fuser,
                    "--use-transformer-engine-op-fuser hands over FP8 by itself: remove one of them",
                ),
                (
                    flag != STORE_FLAG and not fp8,
                    "expected --fp8-format with it, got none: add it or remove the flag",
                ),
                (
                    flag == GRAD_FLAG and getattr(settings, "fp8_recipe", None) == "tensorwise",
                    "a current scale takes two passes over the gradient, as many bytes as Transformer Engine's own: "
                    "remove the flag or use --fp8-recipe delayed or blockwise",
                ),
                (flag == STORE_FLAG and experts, "routed experts are not served: remove it or --num-experts"),
                (flag == STORE_FLAG and offload, "offloading moves bf16 activations: remove one"),
            )
            if why := next((why for present, why in problems if present), None):
                return f"{flag}: {why}"
        return None


BF16 = Fp8Options()
