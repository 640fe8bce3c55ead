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
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def open_model(folder: str, trust: bool = False) -> Any:
    """The model in fp32; every tensor of it must come from the folder.

    Raises:
        SystemExit: tensors missing, left over or of another shape.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    options |= {"output_loading_info": True, "trust_remote_code": trust}
    opened: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    model, info = opened
    wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if wrong:
        raise SystemExit(f"{folder}: expected exactly the model's tensors, got {wrong}")
    return model.eval()


def open_tokenizer(folder: str) -> Any:
    """The folder's tokenizer, None if it has none; code in the folder never reads it, whatever the model needs."""
    has_one = any(
        (Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
    )
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    return AutoTokenizer.from_pretrained(folder, **options) if has_one else None


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


def generate(model: Any, tokenizer: Any, request: dict[str, Any], tokens: torch.Tensor, work: Path) -> None:
    """Continues the prompt: ``generated.txt`` (text, or ids where there is no tokenizer), ``generated.npy`` (its ids).

    ``margins.npy`` has for each new token the distance between the two largest logits.
    """
    prompt = tokens[:1, :8]
    if tokenizer is not None:
        prompt = torch.tensor([tokenizer(request["prompt"], add_special_tokens=False)["input_ids"]])
    room = min(request["new_tokens"], model.config.max_position_embeddings - prompt.shape[1])
    ids, margins = prompt, torch.empty(0)
    if room > 0:
        torch.manual_seed(0)
        end = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig(eos_token_id=end)  # penalties and beams are not the model's
        options = {"max_new_tokens": room, "do_sample": request["sample"]}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        done = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        best = torch.cat(done.logits).float().topk(2).values
        ids, margins = done.sequences, best[:, 0] - best[:, 1]
    text = tokenizer.decode(ids[0], skip_special_tokens=True) if tokenizer else " ".join(map(str, ids[0].tolist()))
    (work / "generated.txt").write_text(text, encoding="utf-8")
    np.save(work / "generated.npy", ids[0].numpy())
    np.save(work / "margins.npy", margins.numpy())


def watch(model: Any, states: dict[str, list[torch.Tensor]]) -> None:
    """Collects what embedding, layers and last norm return, by name, in order, (1, length, hidden) a window."""
    layers = {f"layer {i}": layer for i, layer in enumerate(model.model.layers)}
    for name, part in {"embedding": model.model.embed_tokens, **layers, "final norm": model.model.norm}.items():
        kept = states.setdefault(name, [])
        part.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out))


@torch.no_grad()
def answer(path: str) -> None:
    """Answers a request: ``tokens.npy``, ``hf_logits.npy`` (windows, length, vocabulary), ``hf_states.npy`` (places,
    windows, length, hidden) with the places' names in ``places.json``, and what `generate` writes."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    model, tokenizer = open_model(request["folder"], request["trust"]), open_tokenizer(request["folder"])
    length = min(request["length"], model.config.max_position_embeddings)
    tokens = token_windows({**request, "length": length}, tokenizer, model.config.vocab_size)
    work = Path(path).parent
    generate(model, tokenizer, request, tokens, work)
    states: dict[str, list[torch.Tensor]] = {}
    watch(model, states)
    logits = torch.cat([model(window[None]).logits for window in tokens])
    np.save(work / "tokens.npy", tokens.numpy())
    np.save(work / "hf_logits.npy", logits.float().numpy())
    np.save(work / "hf_states.npy", np.stack([torch.cat(kept).float().numpy() for kept in states.values()]))
    (work / "places.json").write_text(json.dumps(list(states)), encoding="utf-8")


if __name__ == "__main__":
    for request_file in sys.argv[1:]:
        answer(request_file)
