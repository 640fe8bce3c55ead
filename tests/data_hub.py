"""A server on this machine that speaks the paths of the Hugging Face hub that data sets are read by."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

DATASET = "HuggingFaceFW/fineweb-edu"
COMMIT = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"


@dataclass
class Hub:
    """What the server holds and has seen.

    Attributes:
        files: content by path in the data set.
        cuts: how many of the next answers with content break off in the middle.
        delay: seconds before each answer with content.
        requests: (method, path, Range header or None) of each request.
        corrupt: content to send in place of a file's.
    """

    files: dict[str, bytes]
    url: str = ""
    cuts: int = 0
    delay: float = 0.0
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    corrupt: dict[str, bytes] = field(default_factory=dict)

    def ranges(self) -> list[str]:
        """The ranges asked for, in order."""
        return [wanted for _, path, wanted in self.requests if wanted and "/resolve/" in path]


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Serve a folder's files as the data set, at `Hub.url`."""
    hub = Hub({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Stay quiet."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        content = self.rfile.read(length)
        self._note()
        paths = json.loads(content)["paths"]
        self._json([self._entry(path) for path in paths if path in self.hub.files])

    def _note(self) -> None:
        self.hub.requests.append((self.command, self.path, self.headers.get("Range")))

    def _answer(self, body: bool) -> None:
        self._note()
        path = unquote(urlsplit(self.path).path)
        api, files = f"/api/datasets/{DATASET}", f"/datasets/{DATASET}/resolve/{COMMIT}/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self._json({"id": DATASET, "sha": COMMIT, "private": False, "tags": [], "downloads": 0})
        elif path.startswith(f"{api}/tree/{COMMIT}/"):
            self._tree(path.removeprefix(f"{api}/tree/{COMMIT}/"))
        elif path.startswith(files):
            self._file(path.removeprefix(files), body)
        else:
            self._missing("RepoNotFound", 404)

    def _tree(self, folder: str) -> None:
        below = [path for path in self.hub.files if path.startswith(folder + "/")]
        if below:
            self._json([self._entry(path) for path in sorted(below)])
        else:
            self._missing("EntryNotFound", 404)

    def _entry(self, path: str) -> dict:
        content = self.hub.files[path]
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return {"type": "file", "path": path, "size": len(content), "oid": "0" * 40, "lfs": lfs}

    def _file(self, path: str, body: bool) -> None:
        content = self.hub.corrupt.get(path, self.hub.files.get(path))
        if content is None:
            self._missing("EntryNotFound", 404)
            return
        start, stop = 0, len(content)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last) + 1 if last else stop)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(stop - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self._send(content[start:stop])

    def _send(self, content: bytes) -> None:
        time.sleep(self.hub.delay)
        if self.hub.cuts:
            self.hub.cuts -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            with suppress(ConnectionError):  # the reader was killed
                self.wfile.write(content)

    def _json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _missing(self, code: str, status: int) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
