"""An import that is killed at each of its steps on the disk in turn, then run again; a program of its own.

    python tests/checkpoint_kills.py HF FOLDER

prints one JSON object for each kill: the step, which files were finished by then and which the second run wrote, and
whether the result is that of an unbroken import, byte for byte. Each run is a fork of this process, which has imported
everything once and has no other thread.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_act.checkpoint import import_hf, resume, torch_dist

FILE_BYTES = 15_000
STEPS = ("replace", "rename", "unlink", "rmdir", "mkdir")  # of os; pathlib goes through them
WRITES = ("write_text", "write_bytes")  # of Path


class Killer:
    """Ends this process by SIGKILL before its Nth step on the disk, a write of a small file in its middle."""

    def __init__(self, step: int) -> None:
        self.left = step
        self.wrote: list[str] = []

    def install(self) -> None:
        for name in STEPS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        os.fsync = self._counted("fsync", lambda handle: None)  # a killed process leaves the system's buffers alone
        torch.save = self._counted("torch.save", torch.save)
        for name in WRITES:
            setattr(Path, name, self._halved(name, getattr(Path, name)))
        write_file: Any = torch_dist.write_file

        def write(path: Path, *words: Any) -> Any:
            self.wrote.append(path.name)
            return write_file(path, *words)

        torch_dist.write_file = write

    def _dies(self) -> bool:
        self.left -= 1
        return self.left == -1

    def _kill(self, name: str) -> None:
        os.write(2, name.encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def _counted(self, name: str, call: Callable) -> Callable:
        def step(*words: Any, **options: Any) -> Any:
            if self._dies():
                self._kill(name)
            return call(*words, **options)

        return step

    def _halved(self, name: str, call: Callable) -> Callable:
        def step(path: Path, content: Any, *words: Any, **options: Any) -> Any:
            if not self._dies():
                return call(path, content, *words, **options)
            call(path, content[: len(content) // 2], *words, **options)
            return self._kill(name)

        return step


def forked(hf: str, save: Path, step: int) -> dict[str, Any]:
    """Imports in a fork that is killed at a step: how it ended, where, and the files of weights that it began."""
    said, answer = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(said[1], 2)
        killer = Killer(step)
        killer.install()
        import_hf.import_model(hf, save, progress=False)
        os.write(answer[1], json.dumps(killer.wrote).encode())
        os._exit(0)
    for end in (said[1], answer[1]):
        os.close(end)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(said[0]) as words, os.fdopen(answer[0]) as wrote:
        name, files = words.read(), wrote.read()
    return {"signal": os.WTERMSIG(status), "step": name, "wrote": json.loads(files or "[]")}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main(hf: str, base: Path) -> None:
    import_hf.common_state = lambda words: b"common"
    torch_dist.FILE_BYTES = FILE_BYTES
    import_hf.import_model(hf, base / "whole", progress=False)
    whole = content(base / "whole")
    for step in range(1000):
        save = base / str(step)
        first = forked(hf, save, step)
        if not first["signal"]:
            break
        begun = save.exists()
        finished = [Path(name).name for name in resume.Finished(resume.unfinished(save)).files]
        second = {"signal": 0, "wrote": []} if begun else forked(hf, save, 1000)
        left = [path.name for path in base.iterdir() if path.name.startswith(".")]
        same = content(save) == whole
        line = {"step": first["step"], "signal": first["signal"], "published": begun, "finished": finished}
        print(json.dumps(line | {"again": second["signal"], "wrote": second["wrote"], "same": same, "left": left}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
