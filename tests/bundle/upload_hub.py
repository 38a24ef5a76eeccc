"""The fake hub with an upload's routes: models with one branch, large files by LFS, commits whole or not."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).parents[1] / "sources"))
from fake_hub import FakeHub, Handler

TOKEN = "hf_written_here"


@dataclass
class UploadHub(FakeHub):
    """Holds `files` of the model `repo_id` once it `exists`; `commits` are (parent, files after it).

    Files of more than `lfs_bytes` go by LFS. `refuse` names a part of a path that is answered with 403.
    `race` is a commit of somebody else, made when ours arrives.
    """

    exists: bool = True
    lfs_bytes: int = 100
    refuse: str = "nothing"
    race: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    created: dict[str, Any] = field(default_factory=dict)

    @property
    def handler(self) -> type[Handler]:
        return UploadHandler

    @property
    def head(self) -> str:
        return f"{len(self.commits):040x}"

    def commit(self, lines: list[dict[str, Any]]) -> None:
        """Apply a commit's operations, all or none."""
        files = dict(self.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.files = files
        self.commits.append(files)


class UploadHandler(Handler):
    hub: UploadHub  # type: ignore[assignment]

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.hub.log.append((self.command, path, self.headers.get("Authorization")))
        if path != f"/api/models/{self.hub.repo_id}" or not self.hub.exists:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        siblings = [{"rfilename": name} for name in self.hub.files]
        self.answer({"id": self.hub.repo_id, "sha": self.hub.head, "siblings": siblings})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        self.hub.log.append((self.command, path, self.headers.get("Authorization")))
        repo = re.escape(self.hub.repo_id)
        if self.hub.refuse in path or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "no write access"}, 403)
        elif path == "/api/repos/create":
            self.hub.exists, self.hub.created = True, json.loads(body)
            self.answer({"url": f"{self.hub.endpoint}/{self.hub.repo_id}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif re.fullmatch(rf"/api/models/{repo}/preupload/main", path):
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["size"] > self.hub.lfs_bytes else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        elif path == f"/{self.hub.repo_id}.git/info/lfs/objects/batch":
            objects = [
                each | {"actions": {"upload": {"href": f"{self.hub.endpoint}/store/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif re.fullmatch(rf"/api/models/{repo}/commit/main", path):
            self.take([json.loads(line) for line in body.splitlines()])
        else:
            self.answer({}, 404)

    def take(self, lines: list[dict[str, Any]]) -> None:
        if self.hub.race:
            self.hub.commits.append(dict(self.hub.files))
        header = lines[0]["value"]
        if header.get("parentCommit") != self.hub.head:
            self.answer({"error": "a commit has happened since"}, 412)
            return
        self.hub.commit(lines[1:])
        url = f"{self.hub.endpoint}/{self.hub.repo_id}/commit/{self.hub.head}"
        self.answer({"commitUrl": url, "commitOid": self.hub.head})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        digest = self.path.rpartition("/")[2]
        self.hub.log.append((self.command, self.path, None))
        if self.hub.refuse in self.path or hashlib.sha256(body).hexdigest() != digest:
            self.answer({}, 403)
            return
        self.hub.stored[digest] = body
        self.answer({})

    def answer(self, document: object, status: int = 200) -> None:
        # Unlike `reply`, with the body that POST and PUT wait for.
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
