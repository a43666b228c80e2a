"""A local stand-in of the Hub's API: repositories with branches and commits, to read from and to push to."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Repository:
    """Branches and tags -> commit; commit -> files."""

    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: bool = False

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        """Add a commit and return its name."""
        commit = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[commit] = files
        self.refs[branch] = commit
        return commit


@dataclass
class Hub:
    """What the stand-in holds, and what it was asked: (method, path)."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())


@contextlib.contextmanager
def serving(monkeypatch, cache):
    """Within the block huggingface_hub asks the stand-in, and caches in a folder of its own."""
    import huggingface_hub
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    huggingface_hub.close_session()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        huggingface_hub.close_session()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _missing(self, code):
        self._answer(404, {"error": "not found"}, X_Error_Code=code)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.hub.asked.append((self.command, self.path))
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._missing("RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits and not (api and not rest):
            return self._missing("RevisionNotFound")
        files = repository.commits.get(commit, {})
        if api and rest[:1] == ["tree"]:
            entries = [{"type": "file", "path": f, "size": len(b), "oid": "0" * 40} for f, b in files.items()]
            return self._answer(200, entries)
        if api:
            siblings = [{"rfilename": file} for file in files]
            found = {
                "id": name,
                "modelId": name,
                "sha": commit,
                "private": repository.private,
                "siblings": siblings,
                "tags": [],
            }
            return self._answer(200, found)
        file = "/".join(rest[2:])
        if file not in files:
            return self._missing("EntryNotFound")
        etag = f'"{hashlib.sha1(files[file]).hexdigest()}"'
        return self._answer(200, files[file], ETag=etag, X_Repo_Commit=commit)

    def do_POST(self):
        self.hub.asked.append((self.command, self.path))
        body = self._read()
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            fields = json.loads(body)
            name = "/".join(filter(None, (fields.get("organization"), fields["name"])))
            if name in self.hub.repositories:
                return self._answer(409, {"error": "exists", "url": f"{self.hub.endpoint}/{name}"})
            self.hub.repository(name).private = bool(fields.get("private") or fields.get("visibility") == "private")
            return self._answer(200, {"url": f"{self.hub.endpoint}/{name}", "name": name})
        if parts == ["api", "validate-yaml"]:
            return self._answer(200, {"errors": [], "warnings": []})
        name = "/".join(parts[2:4])
        repository = self.hub.repositories[name]
        if parts[4] == "preupload":
            asked = json.loads(body)["files"]
            return self._answer(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        assert parts[4] == "commit", self.path
        files = dict(repository.commits.get(repository.refs.get("main", ""), {}))
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
        commit = repository.add("main", files)
        return self._answer(
            200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}", "commitOid": commit, "success": True}
        )
