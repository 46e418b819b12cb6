"""A Hub on this machine: what huggingface_hub asks of the real one to make repositories, to commit and to read."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import transformers
from huggingface_hub import constants

TOKENS = {"hf_owner": "user", "hf_stranger": "stranger"}
LARGE = (".safetensors", ".arrow", ".bin")  # kept outside git, as the real one's .gitattributes says


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Commits, each with all its files, and branches."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], message: str, branch: str = "main") -> str:
        name = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        self.messages.append(message)
        return name

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        found = self.find(revision)
        assert found is not None
        return self.commits[found]


class FakeHub:
    """The state of the server.

    Attributes:
        url: where it listens.
        repositories: by kind and name, `("dataset", "user/bank")`.
        requests: method and path of each.
        fail: paths that begin so are answered with this status.
    """

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fail: dict[str, int] = {}

    def dataset(self, name: str) -> Repository:
        return self.repositories["dataset", name]

    def model(self, name: str) -> Repository:
        return self.repositories["model", name]

    def make(self, kind: str, name: str, files: dict[str, bytes] | None = None, **flags: bool) -> Repository:
        repository = self.repositories[kind, name] = Repository(**flags)
        repository.commit({".gitattributes": b"", **(files or {})}, "initial commit")
        return repository

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [path.rpartition("/")[2] for path in self.requests if path.startswith("GET ") and "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # an answer is one packet, and none waits for the one before

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, content: object = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def do_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        self.hub.requests.append(f"{self.command} {path}")
        for begin, status in self.hub.fail.items():
            if path.startswith(begin):
                return self.answer(status, {"error": "as asked for"})
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = TOKENS.get(given)
        if given and self.user is None and not path.startswith("/stored/"):
            return self.answer(401, {"error": "bad"}, X_Error_Message="Invalid credentials in Authorization header")
        self.route(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def route(self, path: str, body: bytes) -> None:
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": self.user}) if self.user else self.refuse(401, "NoToken")
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.startswith("/stored/"):
            return self.store(path.removeprefix("/stored/"), body)
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/([a-z]+)(?:/(.+))?)?", path):
            kind, name, action, rest = match.groups()
            self.page = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name = "dataset" if match[1] else "model", match[2]
            action, rest = "resolve", f"{match[3]}/{match[4]}"
        else:
            return self.refuse(404, "NoSuchPath")
        repository = self.hub.repositories.get((kind, name))
        owner = self.user == name.partition("/")[0]
        if repository is None or (repository.private and not owner):
            return self.refuse(404 if self.user else 401, "RepoNotFound")
        if action in ("commit", "branch", "preupload") and not owner:
            return self.refuse(403, "Forbidden")
        getattr(self, f"on_{action or 'revision'}")(repository, rest or "main", body, owner)

    def create(self, asked: dict[str, object]) -> None:
        if self.user is None:
            return self.refuse(401, "NoToken")
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        kind = str(asked.get("type") or "model")
        if not name.startswith(f"{self.user}/"):
            return self.refuse(403, "Forbidden")
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.hub.repositories:
            return self.answer(409, {"url": url})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.make(kind, name, private=private)
        self.answer(200, {"url": url})

    def store(self, digest: str, body: bytes) -> None:
        if self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == digest
            self.hub.stored[digest] = body
            return self.answer(200, {})
        self.answer(200, self.hub.stored[digest])

    def batch(self, asked: dict[str, list[dict[str, object]]]) -> None:
        objects = []
        for item in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/stored/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self.hub.stored else {"actions": upload})})
        self.answer(200, {"transfer": "basic", "objects": objects})

    # Of a repository

    def commit_of(self, repository: Repository, revision: str) -> str | None:
        found = repository.find(revision)
        if found is None:
            self.refuse(404, "RevisionNotFound")
        return found

    def on_revision(self, repository: Repository, revision: str, body: bytes, owner: bool) -> None:
        if commit := self.commit_of(repository, revision):
            files = [{"rfilename": name} for name in repository.commits[commit]]
            self.answer(200, {"id": "any", "sha": commit, "siblings": files, "private": repository.private})

    def on_tree(self, repository: Repository, revision: str, body: bytes, owner: bool) -> None:
        if commit := self.commit_of(repository, revision):
            self.answer(200, [self.entry(name, data) for name, data in repository.commits[commit].items()])

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": git_id(data)}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100}
        return entry

    def on_branch(self, repository: Repository, branch: str, body: bytes, owner: bool) -> None:
        if branch in repository.branches:
            return self.answer(409, {})
        repository.branches[branch] = repository.branches["main"]
        self.answer(200, {})

    def on_preupload(self, repository: Repository, revision: str, body: bytes, owner: bool) -> None:
        there, files = repository.files(revision), []
        for item in json.loads(body)["files"]:
            name = item["path"]
            record = {"path": name, "uploadMode": "lfs" if name.endswith(LARGE) else "regular", "shouldIgnore": False}
            if name in there:
                data = there[name]
                record["oid"] = hashlib.sha256(data).hexdigest() if name.endswith(LARGE) else git_id(data)
            files.append(record)
        self.answer(200, {"files": files})

    def on_commit(self, repository: Repository, branch: str, body: bytes, owner: bool) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent = repository.find(branch)
        if parent is None or header.get("parentCommit") not in (None, parent):
            return self.refuse(412, "PreconditionFailed")
        files = dict(repository.commits[parent])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, header["summary"], branch)
        self.answer(200, {"success": True, "commitUrl": f"{self.page}/commit/{commit}", "commitOid": commit})

    def on_resolve(self, repository: Repository, rest: str, body: bytes, owner: bool) -> None:
        revision, _, name = rest.partition("/")
        if repository.gated and not owner:
            return self.refuse(403, "GatedRepo")
        if (commit := self.commit_of(repository, revision)) is None:
            return None
        data = repository.commits[commit].get(name)
        if data is None:
            return self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        headers = {"X_Repo_Commit": commit, "ETag": f'"{git_id(data)}"', "Accept_Ranges": "bytes"}
        if not name.endswith(LARGE):
            return self.answer(200, data, **headers)
        digest = hashlib.sha256(data).hexdigest()
        self.hub.stored[digest] = data
        headers |= {"X_Linked_Etag": f'"{digest}"', "X_Linked_Size": str(len(data))}
        # Another host, as that of the real one's files: the client follows redirects of the same host at once.
        place = self.hub.url.replace("127.0.0.1", "localhost")
        return self.answer(302, b"", Location=f"{place}/stored/{digest}", **headers)


@contextlib.contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A Hub that listens on a free port, until the end."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join(10)


@contextlib.contextmanager
def using_hub(cache: Path, token: str | None = "hf_owner") -> Iterator[tuple[FakeHub, pytest.MonkeyPatch]]:
    """A Hub of its own that huggingface_hub asks in this process, with a cache of its own."""
    with running_hub() as hub, pytest.MonkeyPatch.context() as patch:
        point_to(patch, hub.url, cache)
        if token is None:
            patch.delenv("HF_TOKEN", raising=False)
        else:
            patch.setenv("HF_TOKEN", token)
        yield hub, patch


def point_to(patch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Let huggingface_hub ask another address, as HF_ENDPOINT and HF_HUB_CACHE do at its import."""
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HUGGINGFACE_HUB_CACHE", str(cache), raising=False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    patch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # made once, with the address of then
