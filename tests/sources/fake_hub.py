"""A Hugging Face hub on the loopback interface: one data set, one commit, a download's routes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


@dataclass
class FakeHub:
    """Serves `files` as `repo_id` at `revision`; use it as a context manager.

    `break_after` ends the next download of a file after so many bytes, once; with
    `down_after_break` the hub is down from then on. While it is `down`, every request is answered
    with 503. `log` holds method, path and Range header of every request.
    """

    repo_id: str
    revision: str
    files: dict[str, bytes]
    break_after: dict[str, int] = field(default_factory=dict)
    down_after_break: bool = False
    down: bool = False
    # Of a hub that lies: the commit that it says it answers for, and what it sends in place of a file.
    other_commit: str | None = None
    sent: dict[str, bytes] = field(default_factory=dict)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)

    def __enter__(self) -> Self:
        handler = type("Handler", (self.handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def handler(self) -> type[Handler]:
        """What answers; hubs that take uploads, too, have their own."""
        return Handler

    @property
    def endpoint(self) -> str:
        """Value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def describe(self, kind: str) -> object:
        """JSON of the routes `revision` and `tree`."""
        if kind == "revision":
            siblings = [{"rfilename": name} for name in self.files]
            commit = self.other_commit or self.revision
            return {"_id": "0", "id": self.repo_id, "sha": commit, "siblings": siblings}
        entries = []
        for name, data in self.files.items():
            entry = {"type": "file", "path": name, "size": len(data), "oid": git_blob(data)}
            if name.endswith(".parquet"):  # in Git there is but a pointer
                digest = hashlib.sha256(data).hexdigest()
                pointer = "version https://git-lfs.github.com/spec/v1\n"
                pointer += f"oid sha256:{digest}\nsize {len(data)}\n"
                entry["oid"] = git_blob(pointer.encode())
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": len(pointer)}
            entries.append(entry)
        return entries


def git_blob(data: bytes) -> str:
    """What `git hash-object` prints."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        api = re.fullmatch(
            r"/api/datasets/(?P<repo>[^/]+/[^/]+)/(revision|tree)/(?P<rev>\w+)", path
        )
        file = re.fullmatch(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>\w+)/(.+)", path)
        match = api or file
        if self.hub.down:
            self.reply(503, b"")
        elif match is None or match["repo"] != self.hub.repo_id:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif match["rev"] != self.hub.revision:
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif api:
            self.reply(200, json.dumps(self.hub.describe(api[2])).encode())
        elif match[3] in self.hub.files:
            self.send_file(match[3])
        else:
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def send_file(self, name: str) -> None:
        data = self.hub.sent.get(name, self.hub.files[name])
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": self.hub.other_commit or self.hub.revision,
            "Accept-Ranges": "bytes",
        }
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        stop = None
        if self.command == "GET" and name in self.hub.break_after:
            stop = self.hub.break_after.pop(name)
            self.hub.down = self.hub.down_after_break
        self.reply(206 if start else 200, data[start:], headers, stop)

    def reply(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        stop: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:stop])
        self.close_connection = stop is not None

    def log_message(self, *_: object) -> None:
        pass
