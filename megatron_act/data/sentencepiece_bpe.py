"""SentencePiece models: their own library as reference, and Llama's kind of model as a tokenizer.json for fastokens.

SentencePiece merges the adjacent pair whose joint piece scores highest, the leftmost of equals. A tokenizer.json ranks
pairs instead: here by that score, then by the joint piece's id. Pieces of equal score (Llama's runs of spaces, added by
hand) therefore double first, which gives the same ids; ranked by the halves' ids they differ from 17 spaces on.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_act.data.encoders import FastokensEncoder, SentencePieceEncoder
from megatron_act.errors import UserError

SPACE = "\u2581"
BPE = 2  # sentencepiece_model.proto, TrainerSpec.ModelType


@dataclass(frozen=True)
class SentencePieceModel:
    """One `.model` file."""

    file: Path
    processor: Any
    kind: str = field(default="sentencepiece", init=False)
    reference_name: str = field(default="sentencepiece", init=False)

    @property
    def size(self) -> int:
        """Number of pieces."""
        return self.processor.get_piece_size()

    @property
    def default_eod(self) -> str:
        """The model's own end of sequence."""
        return self.processor.id_to_piece(self.processor.eos_id()) if self.processor.eos_id() >= 0 else "</s>"

    @cached_property
    def literals(self) -> list[str]:
        """Control pieces as they may stand in a text."""
        pieces = [i for i in range(self.size) if self.processor.is_control(i) or self.processor.is_unknown(i)]
        return [self.processor.id_to_piece(i) for i in pieces[:20]]

    def id_of(self, token: str) -> int | None:
        """The id of a piece."""
        found = self.processor.piece_to_id(token)
        return found if self.processor.id_to_piece(found) == token else None

    def reference(self) -> SentencePieceEncoder:
        """SentencePiece itself."""
        return SentencePieceEncoder(self.processor)

    def fast(self) -> FastokensEncoder:
        """fastokens with the model converted."""
        import fastokens

        return FastokensEncoder(fastokens.Tokenizer.from_json_str(json.dumps(self.converted())))

    def converted(self) -> dict:
        """The model as the content of a tokenizer.json.

        Raises:
            ValueError: a model that a tokenizer.json does not express exactly.
        """
        return _converted(self.file, self.processor)


def open_sentencepiece(file: Path) -> SentencePieceModel:
    """Read a model.

    Raises:
        UserError: it is not one, or the library is not installed.
    """
    try:
        import sentencepiece

        return SentencePieceModel(file, sentencepiece.SentencePieceProcessor(model_file=str(file)))
    except ImportError as error:
        raise UserError(f"expected the sentencepiece package for {file}, got none; pip install it") from error
    except (RuntimeError, OSError, TypeError) as error:
        raise UserError(
            f"expected a tokenizer.json, tekken.json, SentencePiece model or rank file, got {file} ({error}); "
            "give --tokenizer a readable one"
        ) from error


def _converted(file: Path, processor: Any) -> dict:
    from sentencepiece import sentencepiece_model_pb2  # generated: mypy does not see its classes

    proto: Any = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009
    proto.ParseFromString(file.read_bytes())
    if problem := _not_expressible(proto, processor):
        raise ValueError(problem)
    vocabulary = {piece.piece: place for place, piece in enumerate(proto.pieces)}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if proto.normalizer_spec.add_dummy_prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": processor.id_to_piece(processor.unk_id()),
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": _merges(proto, vocabulary),
        },
    }


def _not_expressible(proto: Any, processor: Any) -> str | None:
    """Why a tokenizer.json would not mean the same, or None."""
    normalizer = proto.normalizer_spec
    if proto.trainer_spec.model_type != BPE or not proto.trainer_spec.byte_fallback:
        return "only BPE models with byte fallback are converted"
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        return "the model rewrites text before it merges"
    if proto.trainer_spec.treat_whitespace_as_suffix:
        return "the model puts spaces after words"
    if any(piece.type == piece.USER_DEFINED for piece in proto.pieces):
        return "the model has user-defined pieces"
    return None


def _merges(proto: Any, vocabulary: dict[str, int]) -> list[list[str]]:
    """Every split of every piece into two pieces, best first."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    splits = [
        (-score, vocabulary[piece], vocabulary[piece[:cut]], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [[left, right] for *_, left, right in sorted(splits)]
