"""Megatron checkpoints to Hugging Face and back: read tensor by tensor, mapped by tables, written, proven equal.

``reader``, ``torch_dist`` and ``scalars`` need torch only; ``export`` and ``import_hf`` add transformers (tokenizer and
config). Only ``verify`` runs a model in Megatron and the import asks Megatron's parser, in processes of their own.
"""
