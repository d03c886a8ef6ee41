"""A Hub on this machine, for the real client: repositories in memory, LFS files on a second port, faults to order.

It answers what huggingface_hub asks of the Hub when it pushes and loads models (without Xet): repositories, branches, tags,
commits, LFS uploads, files, listings, renames. What it does not know, it answers with 404.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit


LFS = (".safetensors", ".bin", ".pt", ".pth", ".png")
REPO_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by SHA-256."""

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        # What is visible changes by one assignment, at the end.
        content = json.dumps([title, len(self.commits), sorted((name, sha1(data)) for name, data in files.items())])
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), title, files)
        self.commits.append(commit)
        self.branches[branch] = commit.oid
        return commit

    def at(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.oid == oid), None)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: str | None
    storage: bool


@dataclass
class Fault:
    route: re.Pattern
    times: int
    kind: str
    status: int
    after_bytes: int


class Answer(Exception):
    """Ends the handling of a request."""

    def __init__(self, status: int, body: Any = None, **headers: str):
        self.status, self.body, self.headers = status, body, headers


def refusal(status: int, message: str, code: str | None = None) -> Answer:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, {"error": message}, **headers)


def sha1(content: bytes) -> str:
    """Git's name for a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_lfs(name: str) -> bool:
    return name.endswith(LFS)


class LoopbackHub:
    """Use as a context manager; `endpoint` is what HF_ENDPOINT is to be.

    `users` maps a token to its user and role ("write" or "read").
    """

    def __init__(self) -> None:
        self.users = {"hf_write": ("user", "write"), "hf_read": ("user", "read"), "hf_other": ("other", "write")}
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._servers: list[ThreadingHTTPServer] = []

    def __enter__(self) -> "LoopbackHub":
        for is_storage in (False, True):
            handler = type("Handler", (_Handler,), {"hub": self, "storage": is_storage})
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self._servers.append(server)
        hub, storage = (server.server_address[1] for server in self._servers)
        # Two names: some clients take two ports of one host for the same place, and keep their token on the way.
        self.endpoint, self.storage = f"http://127.0.0.1:{hub}", f"http://localhost:{storage}"
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path, token: str | None) -> dict[str, str]:
        """What the environment of a client needs: this Hub, an empty home, and the token, if there is one."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        } | ({"HF_TOKEN": token} if token else {})

    def commits(self, repo: str) -> list[Commit]:
        """All commits that have ever been made, the oldest first."""
        return list(self.repos[repo].commits) if repo in self.repos else []

    def files(self, repo: str, revision: str) -> dict[str, bytes]:
        """Name to content."""
        commit = self.repos[repo].at(revision)
        assert commit is not None, f"{repo} has no revision {revision}"
        return commit.files

    def write(self, repo: str, name: str, content: str) -> None:
        """Change a file as a person does on the web."""
        self.repos[repo].commit("main", f"Update {name}", self.files(repo, "main") | {name: content.encode()})

    def rename(self, old: str, new: str) -> None:
        """Rename a repository; its old name leads to the new one."""
        self.repos[new] = self.repos.pop(old)
        self.renamed.pop(new, None)
        self.renamed[old] = new

    def fail(self, route: str, times: int, kind: str, status: int = 500, after_bytes: int = 0) -> None:
        """Let the next requests whose "METHOD path" matches `route` fail.

        `kind`: "status" answers with `status`; "drop" closes the connection after so many bytes of the request's body;
        "lost_answer" does what is asked, and then closes it; "stall" waits for `release`; "cut" ends a download after
        so many bytes.
        """
        self._faults.append(Fault(re.compile(route), times, kind, status, after_bytes))

    def release(self) -> None:
        """Let go of requests that stall."""
        self._released.set()
        self._released = threading.Event()

    def wait_for(self, route: str, timeout: float) -> None:
        """Wait until a request matches; counted are those from this call on, and the last one before it."""
        seen, end = max(0, len(self.requests) - 1), time.monotonic() + timeout
        while not any(re.search(route, f"{each.method} {each.path}") for each in self.requests[seen:]):
            assert time.monotonic() < end, f"no request {route}"
            time.sleep(0.01)

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times and fault.route.search(f"{method} {path}"):
                    fault.times -= 1
                    return fault
        return None

    @contextmanager
    def changing(self) -> Iterator[None]:
        with self._lock:
            yield


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    storage: bool
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fault: Fault | None

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _handle(self) -> None:
        hub, method = self.hub, self.command
        header = self.headers.get("Authorization")
        self.token = header.removeprefix("Bearer ") if header else None
        hub.requests.append(Request(method, self.path, self.token, self.storage))
        self.fault = hub.next_fault(method, self.path)
        kind = self.fault.kind if self.fault else None
        length = int(self.headers.get("Content-Length") or 0)
        if kind == "drop" and self.fault:
            self.rfile.read(min(length, self.fault.after_bytes))
            return self._close()
        body = self.rfile.read(length)  # before any answer, or the connection is out of step
        if kind == "stall":
            hub._released.wait()
            return self._close()
        if kind == "status" and self.fault:
            return self._send(refusal(self.fault.status, "ordered by the test"))
        try:
            if self.token is not None and not self.storage and self.token not in hub.users:
                raise refusal(401, "Invalid credentials in Authorization header")
            url = urlsplit(self.path)
            self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
            self._route(method, [unquote(part) for part in url.path.strip("/").split("/")], body)
            raise refusal(404, "unknown route")
        except Answer as answer:
            if kind == "lost_answer":
                return self._close()
            self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _close(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, answer: Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        if answer.body is None:
            body = b""
        self.send_response(answer.status)
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json"} | answer.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.kind == "cut":
            self.wfile.write(body[: self.fault.after_bytes])
            return self._close()
        self.wfile.write(body)

    # ---- Routes ----

    def _route(self, method: str, path: list[str], body: bytes) -> None:
        if self.storage:
            return self._storage(method, path, body)
        if path[:1] != ["api"]:
            if path[-3:] == ["lfs", "objects", "batch"]:
                return self._lfs_batch("/".join(path[:2]).removesuffix(".git"), json.loads(body))
            if path[2:3] == ["resolve"]:
                return self._resolve("/".join(path[:2]), path[3], "/".join(path[4:]))
            return
        if path[1:] == ["whoami-v2"]:
            name, role = self._user()
            raise Answer(200, {"type": "user", "name": name, "auth": {"accessToken": {"role": role}}})
        if path[1:] == ["repos", "create"]:
            self._create(json.loads(body))
        if path[1:] == ["validate-yaml"]:
            raise Answer(200, {"errors": [], "warnings": []})
        if path[1] == "models" and len(path) >= 4:
            self._models("/".join(path[2:4]), path[4] if len(path) > 4 else "", path[5:], body)

    def _user(self) -> tuple[str, str]:
        if self.token is None:
            raise refusal(401, "Invalid username or password.")
        return self.hub.users[self.token]

    def _create(self, asked: dict[str, Any]) -> None:
        user, role = self._user()
        name = f"{asked.get('organization') or user}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if not REPO_NAME.fullmatch(name):
            raise refusal(400, f"Invalid repository name: {name}")
        if name in self.hub.repos and name.split("/")[0] == user:
            raise Answer(409, url | {"error": "You already created this model repo"})
        if role != "write" or name.split("/")[0] != user:
            raise refusal(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]}")
        with self.hub.changing():
            repo = self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
            repo.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        raise Answer(200, url)

    def _readable(self, name: str) -> Repo:
        if name in self.hub.renamed:
            new = self.path.replace(name, self.hub.renamed[name], 1)
            raise Answer(307, {}, Location=f"{self.hub.endpoint}{new}")
        repo = self.hub.repos.get(name)
        owner = self.token is not None and self.hub.users[self.token][0] == name.split("/")[0]
        if repo is None or (repo.private and not owner):
            raise refusal(404 if self.token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, name: str) -> Repo:
        repo = self._readable(name)
        user, role = self._user()
        if role != "write" or user != name.split("/")[0]:
            raise refusal(403, "You don't have the right to write to this repository")
        return repo

    def _at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _models(self, name: str, what: str, rest: list[str], body: bytes) -> None:
        revision = rest[0] if rest else "main"
        actions: dict[str, Callable[[], None]] = {
            "": lambda: self._info(name, "main"),
            "revision": lambda: self._info(name, revision),
            "auth-check": lambda: self._check_access(name, rest),
            "refs": lambda: self._refs(self._readable(name)),
            "tree": lambda: self._tree(self._readable(name), revision, "/".join(rest[1:])),
            "branch": lambda: self._new_ref(self._writable(name), "branches", revision, body),
            "tag": lambda: self._new_ref(
                self._writable(name), "tags", json.loads(body or b"{}").get("tag", ""), body, revision
            ),
            "preupload": lambda: self._preupload(self._writable(name), revision, json.loads(body)),
            "commit": lambda: self._commit(name, self._writable(name), revision, body),
        }
        if what in actions:
            actions[what]()

    def _check_access(self, name: str, rest: list[str]) -> None:
        self._writable(name) if rest == ["write"] else self._readable(name)
        raise Answer(200, {})

    def _info(self, name: str, revision: str) -> None:
        repo = self._readable(name)
        commit = self._at(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        raise Answer(200, {"id": name, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings})

    def _refs(self, repo: Repo) -> None:
        listed = {
            kind: [{"name": name, "ref": f"refs/{ref}/{name}", "targetCommit": oid} for name, oid in names.items()]
            for kind, ref, names in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
        }
        raise Answer(200, listed | {"converts": []})

    def _tree(self, repo: Repo, revision: str, folder: str) -> None:
        files = {
            name: content
            for name, content in self._at(repo, revision).files.items()
            if not folder or name.startswith(f"{folder}/")
        }
        if folder and not files:
            raise refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        rows: dict[str, dict[str, Any]] = {}
        depth = len(folder.split("/")) if folder else 0
        for name, content in files.items():
            parts = name.split("/")
            if self.query.get("recursive", "").lower() != "true" and len(parts) > depth + 1:
                directory = "/".join(parts[: depth + 1])
                rows[directory] = {"type": "directory", "path": directory, "oid": sha1(directory.encode()), "size": 0}
                continue
            rows[name] = {"type": "file", "path": name, "oid": sha1(content), "size": len(content)}
            if is_lfs(name):
                rows[name]["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        raise Answer(200, list(rows.values()))

    def _new_ref(self, repo: Repo, kind: str, name: str, body: bytes, revision: str = "main") -> None:
        names = getattr(repo, kind)
        if name in names:
            raise refusal(409, f"Reference already exists: {name}")
        start = json.loads(body or b"{}").get("startingPoint", revision)
        with self.hub.changing():
            names[name] = self._at(repo, start).oid
        raise Answer(200, {})

    # ---- Commits ----

    def _preupload(self, repo: Repo, revision: str, asked: dict[str, Any]) -> None:
        present = self._at(repo, revision).files
        answers = []
        for file in asked["files"]:
            name, lfs = file["path"], is_lfs(file["path"]) and file["size"] > 0
            oid = {"oid": (sha256 if lfs else sha1)(present[name])} if name in present else {}
            mode = "lfs" if lfs else "regular"
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False} | oid)
        raise Answer(200, {"files": answers})

    def _lfs_batch(self, name: str, asked: dict[str, Any]) -> None:
        repo, answers = self._writable(name), []
        for wanted in asked["objects"]:
            answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.stored:
                href = f"{self.hub.storage}/{quote(name)}/{wanted['oid']}?size={wanted['size']}"
                answer["actions"] = {"upload": {"href": href}}
            answers.append(answer)
        raise Answer(200, {"objects": answers})

    def _storage(self, method: str, path: list[str], body: bytes) -> None:
        if self.token is not None:
            raise refusal(400, "a token was sent to the storage")
        repo, oid = self.hub.repos["/".join(path[:2])], path[2]
        if method == "PUT":
            if sha256(body) != oid or str(len(body)) != self.query["size"]:
                raise refusal(400, "what arrived is not what was announced")
            with self.hub.changing():
                repo.stored[oid] = body
            raise Answer(200, {})
        self._content(repo.stored[oid], {})

    def _commit(self, name: str, repo: Repo, revision: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = lines[0]["value"]
        with self.hub.changing():
            head = self._at(repo, revision)
            if header.get("parentCommit") not in (None, head.oid):
                raise refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for line in lines[1:]:
                value = line["value"]
                path = value["path"]
                if line["key"] == "file":
                    files[path] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in repo.stored:
                        raise refusal(400, f"{path} has not been uploaded to this repository")
                    files[path] = repo.stored[value["oid"]]
                elif line["key"] == "deletedFile":
                    files.pop(path, None)
                elif line["key"] == "deletedFolder":
                    files = {each: content for each, content in files.items() if not each.startswith(path)}
                else:
                    raise refusal(400, f"unknown operation {line['key']}")
            commit = repo.commit(revision, header["summary"], files)
        raise Answer(200, {"commitOid": commit.oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit.oid}"})

    # ---- Files ----

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._readable(name)
        commit = self._at(repo, revision)
        if path not in commit.files:
            raise Answer(
                404,
                {"error": "Entry not found"},
                **{"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit.oid},
            )
        content = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid}
        if not is_lfs(path):
            self._content(content, headers | {"ETag": f'"{sha1(content)}"'})
        oid = sha256(content)
        repo.stored.setdefault(oid, content)
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        raise Answer(302, b"", **headers, **linked, Location=f"{self.hub.storage}/{quote(name)}/{oid}")

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        headers = headers | {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if asked:
            start = int(asked[1])
            span = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            raise Answer(206, content[start:], **headers, **span)
        raise Answer(200, content, **headers)
