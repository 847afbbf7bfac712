"""A hub on this machine: repositories with commits and branches, ranges, uploads, and faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

#: Files of at least this many bytes go through LFS, others into the commit itself.
LFS_BYTES = 4096


@dataclass
class Faults:
    """What goes wrong: by name of a file or repository, and how often it does."""

    #: Bytes after which the transfer of a file is cut, and how many transfers are.
    cut: dict[str, tuple[int, int]] = field(default_factory=dict)
    #: Files that are sent with a byte changed.
    wrong: set[str] = field(default_factory=set)
    #: Statuses that requests are answered with, in this order, before any is answered well.
    statuses: list[int] = field(default_factory=list)
    #: A repository that wants its conditions accepted.
    gated: set[str] = field(default_factory=set)
    #: Files that are lost between their upload and the commit.
    lost: set[str] = field(default_factory=set)
    #: Files that are not sent on after so many bytes, though the connection stays open.
    stalled: dict[str, int] = field(default_factory=dict)
    #: What happens once, when a file is first asked for.
    meanwhile: Callable[[], object] | None = None
    #: Seconds that a file takes.
    slow: float = 0.0


@dataclass
class Repository:
    """Commits by their hash, each a folder of files in memory; branches; what is public of it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    card_data: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit and move a branch to it."""
        listed = repr(
            (sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items()), len(self.commits))
        )
        name = hashlib.sha1(listed.encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name


@dataclass
class Hub:
    """The server's state, and what it was asked: ``(method, path, first byte, last byte sent)``."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    asked: list[tuple[str, str]] = field(default_factory=list)
    sent: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The files that were sent, each time that they were."""
        return [name for name, _, _ in self.sent]

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        found = self.repositories[repository]
        return found.commits[found.branches[branch]]

    def environment(self) -> dict[str, str]:
        """The variables that lead huggingface_hub here."""
        return {
            "HF_ENDPOINT": self.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5",
        }  # fmt: skip


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub while the block runs."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the base class's names

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append((self.command, path))
        self._body = self._read_body()
        if self.state.faults.statuses and (self.command != "HEAD"):
            self._refuse(self.state.faults.statuses.pop(0), "")
            return
        for method, pattern, answer in _ROUTES:
            if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                answer(self, *match.groups())
                return
        self._refuse(404, "")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _repository(self, name: str, revision: str = "main") -> tuple[Repository, str] | None:
        """A repository and the commit of a revision; None if the request was refused."""
        found = self.state.repositories.get(name)
        if found is None:
            self._refuse(404, "RepoNotFound")
        elif name in self.state.faults.gated:
            self._refuse(403, "GatedRepo")
        elif (commit := found.branches.get(revision, revision)) not in found.commits:
            self._refuse(404, "RevisionNotFound")
        else:
            return found, commit
        return None

    def info(self, name: str, revision: str | None = None) -> None:
        if (found := self._repository(name, revision or "main")) is not None:
            repository, commit = found
            files = [_listed(path, data) for path, data in repository.commits[commit].items()]
            card = {"cardData": repository.card_data} if repository.card_data else {}
            self._answer({"id": name, "sha": commit, "siblings": files, **card})

    def tree(self, name: str, revision: str) -> None:
        if (found := self._repository(name, revision)) is not None:
            repository, commit = found
            listed = map(_listed, *zip(*repository.commits[commit].items(), strict=True))
            self._answer(
                [{"type": "file", "path": file.pop("rfilename"), "oid": file["blobId"]} | file for file in listed]
            )

    def resolve(self, name: str, revision: str, path: str) -> None:
        faults = self.state.faults
        if (found := self._repository(name, revision)) is None:
            return
        repository, commit = found
        if path not in repository.commits[commit]:
            self._refuse(404, "EntryNotFound")
            return
        data = repository.commits[commit][path]
        etag = hashlib.sha256(data).hexdigest()
        if path in faults.wrong:
            data = data[:-1] + bytes([data[-1] ^ 1])
        first = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if self.headers.get("Range") else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - first))
        if self.headers.get("Range"):
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if faults.meanwhile is not None:
            action, faults.meanwhile = faults.meanwhile, None
            action()
        time.sleep(faults.slow)
        if (stall := faults.stalled.pop(path, None)) is not None:
            self.wfile.write(data[first:stall])
            self.wfile.flush()
            self.connection.recv(1)  # until the other side is gone
            self.close_connection = True
            return
        stop, left = faults.cut.get(path, (len(data), 0))
        if left:
            faults.cut[path] = (stop, left - 1)
            self.wfile.write(data[first : max(first, stop)])
            self.state.sent.append((path, first, max(first, stop)))
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(data[first:])
        self.state.sent.append((path, first, len(data)))

    def create(self) -> None:
        asked = json.loads(self._body)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in self.state.repositories:
            self._answer({"url": f"{self.state.address}/{name}"}, 409)
            return
        self.state.repositories[name] = Repository()
        self.state.repositories[name].commit({".gitattributes": b""})
        private = asked.get("private", asked.get("visibility") == "private")  # releases of the client differ
        self.state.repositories[name].card_data["private"] = str(private)
        self._answer({"url": f"{self.state.address}/{name}"})

    def branch(self, name: str, branch: str) -> None:
        if (found := self._repository(name)) is not None:
            repository, commit = found
            exists = branch in repository.branches
            repository.branches.setdefault(branch, commit)
            self._answer({}, 409 if exists else 200)

    def preupload(self, name: str, revision: str) -> None:
        if self._repository(name, revision) is not None:
            files = json.loads(self._body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LFS_BYTES else "regular", "shouldIgnore": False}
                for f in files
            ]
            self._answer({"files": modes})

    def batch(self, name: str) -> None:
        objects = []
        for asked in json.loads(self._body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.state.address}/objects/{asked['oid']}"}}}
            objects.append(asked | ({} if asked["oid"] in self.state.objects else upload))
        self._answer({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        self.state.objects[oid] = self._body
        self._answer({})

    def commit(self, name: str, branch: str) -> None:
        if (found := self._repository(name, branch)) is None:
            return
        repository, head = found
        files = dict(repository.commits[head])
        for line in self._body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit") not in (None, head):
                self._refuse(412, "")
                return
            if value.get("path") in self.state.faults.lost:
                continue
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        made = repository.commit(files, branch)
        url = f"{self.state.address}/{name}/commit/{made}"
        self._answer({"commitOid": made, "commitUrl": url, "hookOutput": "", "success": True})

    def yaml(self) -> None:
        self._answer({"errors": [], "warnings": []})

    def _answer(self, data: Any, status: int = 200) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def _listed(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()
    entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob}
    if len(data) >= LFS_BYTES:
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"sha256": digest, "oid": digest, "size": len(data), "pointerSize": 134}
    return entry


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET HEAD", rf"/api/models/{_NAME}", _Handler.info),
    ("GET HEAD", rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("GET HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/objects/(\w+)", _Handler.store),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("POST", r"/api/validate-yaml", _Handler.yaml),
]


def main() -> None:
    """Serve until standard input ends, for trying things by hand."""
    with serving() as hub:
        print(json.dumps(hub.environment()), flush=True)
        os.read(0, 1)


if __name__ == "__main__":
    main()
