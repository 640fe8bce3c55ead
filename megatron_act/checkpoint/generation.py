"""``generation_config.json``: what ``generate`` does by default with an exported model."""

from collections.abc import Mapping
from typing import Any

from megatron_act.checkpoint.tokenizer import SPECIAL, Tokenizer
from megatron_act.errors import UserError


def generation_config(config: Mapping[str, Any], words: Tokenizer | None) -> dict[str, Any]:
    """The tokenizer folder's own generation config; without one, the special tokens that ``config.json`` names.

    Args:
        config: content of the model's ``config.json``.
        words: the tokenizer that goes with it.

    Raises:
        UserError: the folder's config names a token that the model has no row for: another model's.
    """
    if words is None or words.generation is None:
        return {"_from_model_config": True, **{name: config[name] for name in SPECIAL if config.get(name) is not None}}
    rows = config["vocab_size"]
    for name in SPECIAL:
        given = words.generation.get(name)
        for token in given if isinstance(given, list) else [given]:
            if token is not None and not 0 <= token < rows:
                raise UserError(
                    f"{words.folder}/generation_config.json: expected {name} below {rows}, got {token}: remove "
                    "the file, or give the tokenizer that the model was trained with"
                )
    return dict(words.generation)
