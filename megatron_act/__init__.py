"""megatron-act: trainable activation functions for Megatron-Core pretraining.

Importing this package loads neither Megatron-Core nor Transformer Engine; ``megatron_act.specs`` does the former.
"""

__version__ = "0.1.0"
