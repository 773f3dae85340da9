"""A Hub on loopback: as much of its HTTP interface as pushing and loading models needs, with one branch per repository.

`serve` yields a `Hub`, whose `environment` points huggingface_hub of a subprocess at it.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_dummy"


@dataclass
class Hub:
    url: str
    repositories: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)  # by id: the files at every commit
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)

    def environment(self, home: Path) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def files(self, repo_id: str) -> dict[str, bytes]:
        return self.repositories[repo_id][-1]

    def commit_id(self, repo_id: str, revision: str = "main") -> str:
        """40 hex digits that follow from repository and number of commits."""
        if revision != "main":
            return revision
        return hashlib.sha1(f"{repo_id} {len(self.repositories[repo_id])}".encode()).hexdigest()

    def files_at(self, repo_id: str, revision: str) -> dict[str, bytes]:
        for number, files in enumerate(self.repositories[repo_id]):
            if revision == hashlib.sha1(f"{repo_id} {number + 1}".encode()).hexdigest():
                return files
        return self.files(repo_id)


def blob_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def reply(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code: str, message: str, status: int = 404) -> None:
        self.reply({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def parts(self) -> list[str]:
        self.hub.requests.append(f"{self.command} {self.path}")
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def is_authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self) -> None:
        body, parts = self.body(), self.parts()
        if parts == ["api", "validate-yaml"]:
            self.reply({"errors": [], "warnings": []})
        elif not self.is_authorized():
            self.refuse("Unauthorized", "Invalid username or password.", 401)
        elif parts == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif parts[4:5] == ["preupload"]:
            files = json.loads(body)["files"]
            self.reply({"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif parts[4:5] == ["commit"]:
            self.commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])
        else:
            self.refuse("NotFound", f"POST {self.path}")

    def create(self, request: dict) -> None:
        repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repositories:
            self.reply({**answer, "error": "You already created this model repo"}, 409)
            return
        self.hub.repositories[repo_id] = [{".gitattributes": b""}]
        if request.get("private") or request.get("visibility") == "private":
            self.hub.private.add(repo_id)
        self.reply(answer)

    def commit(self, repo_id: str, lines: list[dict]) -> None:
        files = dict(self.hub.files(repo_id))
        for line in lines:
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.hub.repositories[repo_id].append(files)
        commit = self.hub.commit_id(repo_id)
        self.reply({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.parts()
        is_api = parts[:2] == ["api", "models"]
        repo_id, rest = ("/".join(parts[2:4]), parts[4:]) if is_api else ("/".join(parts[:2]), parts[2:])
        hidden = repo_id in self.hub.private and not self.is_authorized()
        if repo_id not in self.hub.repositories or hidden:
            self.refuse("RepoNotFound", "Repository not found")
            return
        revision = rest[1] if len(rest) > 1 else "main"
        commit, files = self.hub.commit_id(repo_id, revision), self.hub.files_at(repo_id, revision)
        if is_api and rest[:1] == ["tree"]:
            self.reply([tree_entry(path, content) for path, content in files.items()])
        elif is_api:
            siblings = [{"rfilename": path} for path in files]
            self.reply({"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "tags": []})
        elif rest[:1] != ["resolve"] or "/".join(rest[2:]) not in files:
            self.refuse("EntryNotFound", "Entry not found")
        else:
            content = files["/".join(rest[2:])]
            self.reply(content, X_Repo_Commit=commit, ETag=f'"{blob_id(content)}"')


def tree_entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}


@contextmanager
def serve() -> Iterator[Hub]:
    handler = type("HubHandler", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub = handler.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
