"""A local stand-in for the Hugging Face hub, for download and upload, and the settings that reach it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

TOKEN = "hf_secret"


class Hub:
    """Model repositories in memory.

    Attributes:
        url: base address.
        commits: repository -> commit -> path -> content.
        branches: repository -> branch -> commit.
        private, gated: names of repositories that need TOKEN.
        requests: "METHOD /path" of each request so far.
        drip: whether the bodies of files are sent a byte every hundredth of a second.
        before: seconds before the body of a file.
    """

    def __init__(self) -> None:
        self.url = ""
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.drip, self.before = False, 0.0

    def add(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with further files to a branch, and return the commit's name."""
        branches = self.branches.setdefault(repository, {})
        old = self.commits.setdefault(repository, {}).get(branches.get(branch, ""), {})
        text = repr((repository, branch, len(self.commits[repository]))).encode()
        branches[branch] = hashlib.sha1(text).hexdigest()
        self.commits[repository][branches[branch]] = {**old, **files}
        return branches[branch]

    def main(self, repository: str) -> dict[str, bytes]:
        """Return the newest files of a repository."""
        return self.commits[repository][self.branches[repository]["main"]]

    def refusal(self, repository: str, token: str | None) -> tuple[int, str] | None:
        """Return the status and the error code of a request that is refused."""
        if repository not in self.commits or (repository in self.private and token != TOKEN):
            return (401 if token is None else 404), "RepoNotFound"
        return (403 if token else 401, "GatedRepo") if repository in self.gated and token != TOKEN else None

    def post(self, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        """Return the status and the answer of a step of an upload."""
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            status = 409 if repository in self.commits else 200
            if status == 200:
                self.add(repository, {".gitattributes": b""})
            return status, {"url": f"{self.url}/{repository}"}
        if found := re.fullmatch(r"/api/models/(.+)/preupload/\w+", path):
            files = [{"path": x["path"], "shouldIgnore": False} for x in json.loads(body)["files"]]
            modes = ({**x, "uploadMode": "lfs" if x["path"].endswith(".safetensors") else "regular"} for x in files)
            return 200, {"files": list(modes)}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**x, "actions": {"upload": {"href": f"{self.url}/lfs/{x['oid']}"}}}
                for x in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if found := re.fullmatch(r"/api/models/(.+)/commit/(\w+)", path):
            repository, branch = found.groups()
            lines = [json.loads(line) for line in body.splitlines()]
            values = [(x["key"], x["value"]) for x in lines]
            files = {x["path"]: base64.b64decode(x["content"]) for key, x in values if key == "file"}
            files |= {x["path"]: self.blobs[x["oid"]] for key, x in values if key == "lfsFile"}
            commit = self.add(repository, files, branch)
            return 200, {"commitUrl": f"{self.url}/{repository}/commit/{commit}", "commitOid": commit}
        return 404, {"error": "no such route"}


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.drip and self.command == "GET":
            with contextlib.suppress(OSError):
                for i in range(len(body)):
                    self.wfile.write(body[i : i + 1])
                    time.sleep(0.01)
            return
        time.sleep(self.hub.before)
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/.+)?", self.path):
            repository = found[1]
            body = {"id": repository, "sha": self.hub.branches.get(repository, {}).get("main"), "siblings": []}
            return self.reply(200, json.dumps(body).encode())
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.path)
        if found is None:
            return self.reply(404)
        repository, revision, file = found.groups()
        if refused := self.hub.refusal(repository, self.token()):
            return self.reply(refused[0], X_Error_Code=refused[1])
        commit = self.hub.branches[repository].get(revision, revision)
        files = self.hub.commits[repository].get(commit)
        if files is None:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        if file not in files:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        etag = hashlib.sha256(files[file]).hexdigest()
        self.reply(200, files[file], X_Repo_Commit=commit, ETag=f'"{etag}"')

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, answer = self.hub.post(self.path, body, self.token())
        self.reply(status, json.dumps(answer).encode(), Content_Type="application/json")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.blobs[self.path.rpartition("/")[2]] = body
        self.reply(200)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serve(cache: Path, patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a hub in a thread; the library, which read its settings when it was imported, asks it and caches there."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub})) as http:
        hub.url = f"http://127.0.0.1:{http.server_address[1]}"
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # uploads would ask for a token of Xet
        patch.delenv("HF_TOKEN", raising=False)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            huggingface_hub.close_session()
            http.shutdown()
            thread.join()
