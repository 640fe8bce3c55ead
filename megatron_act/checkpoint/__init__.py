"""Megatron checkpoints to Hugging Face: read tensor by tensor, mapped by tables, written as safetensors, proven equal.

``reader`` and ``scalars`` need torch only; ``export`` adds a tokenizer's transformers; only ``verify`` runs Megatron,
and it does so in a process of its own.
"""
