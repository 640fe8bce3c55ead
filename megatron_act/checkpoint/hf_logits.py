"""Runs model folders through transformers; a program of its own that imports nothing of this project.

    python -I hf_logits.py REQUEST.json...

``verify`` starts it in Python's isolated mode, so that what it sees is what any user of the exported folder sees. The
request names the folder, the text or number of tokens, and the prompt; the answers go beside it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def open_model(folder: str) -> Any:
    """The model in fp32; every tensor of it must come from the folder.

    Raises:
        SystemExit: tensors missing, left over or of another shape.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    opened: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, info = opened
    wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if wrong:
        raise SystemExit(f"{folder}: expected exactly the model's tensors, got {wrong}")
    return model.eval()


def open_tokenizer(folder: str) -> Any:
    """The folder's tokenizer, None if it has none."""
    has_one = any(
        (Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
    )
    return AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_one else None


def token_windows(request: dict[str, Any], tokenizer: Any, vocab_size: int) -> torch.Tensor:
    """Token ids (windows, length): of the text, or uniform ones from a fixed seed without text."""
    windows, length = request["windows"], request["length"]
    if request["text"] is not None and tokenizer is None:
        raise SystemExit(
            "--text: expected a tokenizer in the folder, got none: export with --tokenizer, or leave out --text"
        )
    if request["text"] is None:
        return torch.randint(vocab_size, (windows, length), generator=torch.Generator().manual_seed(0))
    ids = tokenizer(request["text"], add_special_tokens=False)["input_ids"][: windows * length]
    if not ids:
        raise SystemExit("--text: expected some tokens, got an empty text")
    length = min(length, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def generate(model: Any, tokenizer: Any, request: dict[str, Any], tokens: torch.Tensor) -> str:
    """A continuation of the prompt as text, or as ids where there is no tokenizer."""
    prompt = tokens[:1, :8]
    if tokenizer is not None:
        prompt = torch.tensor([tokenizer(request["prompt"], add_special_tokens=False)["input_ids"]])
    room = model.config.max_position_embeddings - prompt.shape[1]
    torch.manual_seed(0)
    result = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max(1, min(request["new_tokens"], room)),
        do_sample=request["sample"],
    )[0]
    return tokenizer.decode(result, skip_special_tokens=True) if tokenizer else " ".join(map(str, result.tolist()))


@torch.no_grad()
def answer(path: str) -> None:
    """Answers a request: ``tokens.npy``, ``hf_logits.npy`` (windows, length, vocabulary) and ``generated.txt``."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    model, tokenizer = open_model(request["folder"]), open_tokenizer(request["folder"])
    length = min(request["length"], model.config.max_position_embeddings)
    tokens = token_windows({**request, "length": length}, tokenizer, model.config.vocab_size)
    logits = torch.cat([model(window[None]).logits for window in tokens])
    work = Path(path).parent
    np.save(work / "tokens.npy", tokens.numpy())
    np.save(work / "hf_logits.npy", logits.float().numpy())
    (work / "generated.txt").write_text(generate(model, tokenizer, request, tokens), encoding="utf-8")


if __name__ == "__main__":
    for request_file in sys.argv[1:]:
        answer(request_file)
