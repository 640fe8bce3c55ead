"""Gives the entry point command lines that it must refuse; prints each one's exit code and error as JSON."""

import contextlib
import io
import json
import sys

from megatron_act import cpu_backend

cpu_backend.install()

from megatron_act import pretrain_gpt  # noqa: E402


def refuse(words: list[str]) -> dict:
    sys.argv = ["pretrain_gpt", *words]
    error, output = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(output):
        code = pretrain_gpt._entry()
    return {"code": code, "error": error.getvalue()}


if __name__ == "__main__":
    commands = json.loads(sys.argv[1])
    print("REPORT " + json.dumps([refuse(words) for words in commands]))
