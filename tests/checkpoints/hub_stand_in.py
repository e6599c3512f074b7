"""A stand-in of the hub on this machine: what `huggingface_hub` asks for to make, fill and read a model's repository.

Repositories are kept in memory. Files that the hub would keep in LFS (`.safetensors`, `.bin`) have to be sent there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
_NAME = r"(?P<id>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """Commits by their hash, each a dict from path to content; branches by name."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def add(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        said = json.dumps([len(self.commits), sorted(files), message])
        commit = hashlib.sha1(said.encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        self.messages.append(message)
        return commit

    def at(self, revision: str) -> str | None:
        """The commit of a branch, or the commit itself."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Hub:
    """The hub of a test: `repositories` by id, and every request that it got, as `METHOD /path`."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    address: str = ""

    def put_folder(self, name: str, folder: Path) -> str:
        """A repository with the files of a folder; returns the commit."""
        repository = self.repositories.setdefault(name, Repository())
        return repository.add("main", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        return

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, methods, act in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                act(self, body, **match.groupdict())
                return
        self._json({"error": f"no such page: {path}"}, 404)

    def _json(self, content: Any, status: int = 200, **headers: str) -> None:
        self._bytes(json.dumps(content).encode(), status, **{"Content-Type": "application/json", **headers})

    def _bytes(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._json({"error": "Invalid credentials"}, 401)
        return False

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        allowed = found is not None and (not found.private or self.headers.get("Authorization") == f"Bearer {TOKEN}")
        if not allowed:
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return None
        return found

    def _commit(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self._repository(name)
        if repository is None:
            return None
        commit = repository.at(revision)
        if commit is None:
            self._json({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
            return None
        return commit, repository.commits[commit]

    # ---- writing

    def create(self, body: bytes) -> None:
        if not self._may_write():
            return
        said = json.loads(body)
        name = f"{said['organization']}/{said['name']}"
        url = {"url": f"{self.hub.address}/{name}"}
        if name in self.hub.repositories:
            self._json({**url, "error": "You already created this model repo"}, 409)
            return
        private = said.get("visibility") == "private" or bool(said.get("private"))
        self.hub.repositories[name] = Repository(private)
        self.hub.repositories[name].add("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self._json(url)

    def branch(self, body: bytes, id: str, branch: str) -> None:
        if not self._may_write() or (repository := self._repository(id)) is None:
            return
        if branch in repository.branches:
            self._json({"error": "Reference already exists"}, 409)
            return
        repository.branches[branch] = repository.branches["main"]
        self._json({})

    def preupload(self, body: bytes, id: str, revision: str) -> None:
        if not self._may_write() or self._commit(id, revision) is None:
            return
        files = [
            {"path": one["path"], "uploadMode": _mode(one["path"]), "shouldIgnore": False}
            for one in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def lfs_batch(self, body: bytes, id: str) -> None:
        if not self._may_write():
            return
        objects = []
        for one in json.loads(body)["objects"]:
            there = one["oid"] in self.hub.stored
            upload = {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}}
            objects.append({**one, **({} if there else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._json({"error": "another content"}, 400)
            return
        self.hub.stored[oid] = body
        self._json({})

    def commit(self, body: bytes, id: str, revision: str) -> None:
        if not self._may_write() or (found := self._commit(id, revision)) is None:
            return
        files, message = dict(found[1]), ""
        for line in filter(None, body.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                assert _mode(value["path"]) == "regular", value["path"]
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.repositories[id].add(revision, files, message)
        self._json({"commitUrl": f"{self.hub.address}/{id}/commit/{commit}", "commitOid": commit})

    def validate_yaml(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        errors = [] if re.match(r"---\n.*?\n---\n", text, re.DOTALL) else [{"message": "no front matter"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    # ---- reading

    def info(self, body: bytes, id: str, revision: str = "main") -> None:
        found = self._commit(id, revision)
        if found is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            private = self.hub.repositories[id].private
            self._json({"id": id, "sha": found[0], "private": private, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, id: str, revision: str) -> None:
        found = self._commit(id, revision)
        if found is None:
            return
        entries = []
        for path, content in found[1].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if _mode(path) == "lfs":
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def resolve(self, body: bytes, id: str, revision: str, path: str) -> None:
        found = self._commit(id, revision)
        if found is None:
            return
        content = found[1].get(path)
        if content is None:
            self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=found[0])
            return
        digest = (hashlib.sha256 if _mode(path) == "lfs" else hashlib.sha1)(content).hexdigest()
        self._bytes(content, ETag=f'"{digest}"', X_Repo_Commit=found[0])


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".bin")) else "regular"


_ROUTES = (
    (r"/api/repos/create", ("POST",), _Handler.create),
    (r"/api/validate-yaml", ("POST",), _Handler.validate_yaml),
    (rf"/api/models/{_NAME}/branch/(?P<branch>[\w.-]+)", ("POST",), _Handler.branch),
    (rf"/api/models/{_NAME}/preupload/(?P<revision>[\w.-]+)", ("POST",), _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/(?P<revision>[\w.-]+)", ("POST",), _Handler.commit),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", ("POST",), _Handler.lfs_batch),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", ("PUT",), _Handler.lfs_put),
    (rf"/api/models/{_NAME}/revision/(?P<revision>[\w.-]+)", ("GET",), _Handler.info),
    (rf"/api/models/{_NAME}/tree/(?P<revision>[\w.-]+)", ("GET",), _Handler.tree),
    (rf"/api/models/{_NAME}", ("GET",), _Handler.info),
    (rf"/{_NAME}/resolve/(?P<revision>[\w.-]+)/(?P<path>.+)", ("GET", "HEAD"), _Handler.resolve),
)


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub for the block, at its `address`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
