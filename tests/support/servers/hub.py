"""A Hugging Face hub on 127.0.0.1: what huggingface-hub asks of the real one, and the faults a network adds."""

import hashlib
import json
import re
import sys
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

IN_STORAGE = (".safetensors",)  # kept beside git: the hub redirects to a storage host of its own


@dataclass(frozen=True)
class Request:
    """One answered request: what was asked, the answer's status, and how many bytes of content it carried."""

    method: str
    file: str  # of a repository; "" for the API
    path: str
    range: str | None
    authorized: bool
    status: int
    sent: int


@dataclass
class Repository:
    """Branches, tags and refs by name, each a commit. `gated`: files need `token`, listings do not."""

    gated: bool = False
    private: bool = False
    token: str = "hf_let_me_in"
    lost: set[str] = field(default_factory=set)  # listed, and answered with 404
    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Path] = field(default_factory=dict)

    def commit(self, folder: Path, revision: str = "main") -> str:
        """Let `revision` be the files of `folder` -> the commit, a hash of their names and contents."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        text = "".join(f"{path.relative_to(folder)} {_sha256(path)}\n" for path in files)
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = folder
        self.revisions[revision] = commit
        return commit

    def resolve(self, revision: str) -> tuple[str, Path] | None:
        """A branch, tag, ref or commit -> (commit, folder)."""
        commit = self.revisions.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


@dataclass
class _Cut:
    """Close the connection after `after` bytes of content, `times` times; `held` for a while before that."""

    after: int
    times: float
    held: bool = False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the client was killed, as tests do
            super().handle_error(request, client_address)


class Hub:
    """Serves `repositories` (id -> Repository) at `url` while it is entered; `requests` is its log.

    Large files are answered by a redirect to a second port, as the hub's are: another host for a client, to which no
    token may go.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self._cuts: dict[str, _Cut] = {}
        self._stored: dict[str, Path] = {}  # sha256 -> file
        self._lock = threading.Lock()
        self._healed = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> "Hub":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.heal()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, folder: Path, **options: object) -> Repository:
        self.repositories[name] = Repository(**options)
        self.repositories[name].commit(folder)
        return self.repositories[name]

    def cut(self, file: str, after: int, times: float = 1) -> None:
        """Break the next `times` downloads of `file` off after `after` bytes of content each."""
        self._cuts[file] = _Cut(after, times)

    def hold(self, file: str, after: int) -> None:
        """Let downloads of `file` go on after `after` bytes of content only when the hub is healed or closed."""
        self._healed.clear()
        self._cuts[file] = _Cut(after, float("inf"), held=True)

    def heal(self) -> None:
        """No download is broken off or held any more, and the log begins anew."""
        self._cuts.clear()
        self._healed.set()
        self.requests.clear()

    def fault(self, file: str, nbytes: int) -> _Cut | None:
        """What happens to this answer, which carries `nbytes` of `file`."""
        with self._lock:
            cut = self._cuts.get(file)
            if cut is None or cut.times <= 0 or cut.after >= nbytes:
                return None
            cut.times -= 1
            return cut

    def wait_until_healed(self) -> None:
        self._healed.wait()

    def note(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def store(self, path: Path) -> str:
        digest = _sha256(path)
        self._stored[digest] = path
        return digest

    def stored(self, digest: str) -> Path | None:
        return self._stored.get(digest)

    def sent(self) -> dict[str, int]:
        """File -> bytes of its content that were sent."""
        found: dict[str, int] = defaultdict(int)
        for request in self.requests:
            if request.file and request.method == "GET" and request.status in (200, 206):
                found[request.file] += request.sent
        return found


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.file = ""
        try:
            if self.server.server_port != int(self.hub.url.rpartition(":")[2]):
                self._from_storage(path)
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._info(match[1], match[2] or "main")
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^?]+)", path):
                self._tree(match[1], urlsplit(self.path).path.partition("/tree/")[2])
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)", path):
                self._resolve(match[1], urlsplit(self.path).path.partition("/resolve/")[2])
            else:
                raise _Refused(404, "", "Not Found")
        except _Refused as error:
            headers = {"X-Error-Message": error.message}
            if error.code:
                headers["X-Error-Code"] = error.code
            self._send(error.status, json.dumps({"error": error.message}).encode(), headers)

    # --- what is asked for ---

    def _repository(self, name: str) -> Repository:
        """The repository, or what the hub says of one that does not exist, or that this token may not see."""
        repository = self.hub.repositories.get(name)
        hidden = repository is None or (repository.private and not self._may_read(repository))
        if not hidden:
            return repository
        if self.headers.get("Authorization") is None:
            raise _Refused(401, "", "Invalid username or password.")
        raise _Refused(404, "RepoNotFound", "Repository not found")

    def _may_read(self, repository: Repository) -> bool:
        return self.headers.get("Authorization") == f"Bearer {repository.token}"

    def _revision(self, name: str, revision: str) -> tuple[Repository, str, Path]:
        repository = self._repository(name)
        found = repository.resolve(revision)
        if found is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, *found

    def _info(self, name: str, revision: str) -> None:
        repository, commit, folder = self._revision(name, revision)
        siblings = [{"rfilename": path} for path in _listing(folder)]
        info = {"_id": "0", "id": name, "modelId": name, "sha": commit, "siblings": siblings}
        info |= {"private": repository.private, "gated": "manual" if repository.gated else False}
        self._send_json(info)

    def _tree(self, name: str, rest: str) -> None:
        revision, _, below = rest.partition("/")
        _, _, folder = self._revision(name, unquote(revision))
        below = unquote(below)
        recursive = "recursive=true" in self.path.lower()
        rows = []
        for path, file in _listing(folder, directories=True).items():
            parent = path.rpartition("/")[0]
            if parent == below or (recursive and f"{parent}/".startswith(f"{below}/" if below else "")):
                rows.append(self._row(path, file))
        if below and not rows:
            raise _Refused(404, "EntryNotFound", f"{below} does not exist on {revision}")
        self._send_json(rows)

    def _row(self, path: str, file: Path) -> dict:
        if file.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
        size = file.stat().st_size
        row = {"type": "file", "oid": _git_oid(file), "size": size, "path": path}
        if path.endswith(IN_STORAGE):
            row["lfs"] = {"oid": _sha256(file), "size": size, "pointerSize": 134}
        return row

    def _resolve(self, name: str, rest: str) -> None:
        revision, _, self.file = (unquote(part) for part in rest.partition("/"))
        repository, commit, folder = self._revision(name, revision)
        if repository.gated and not self._may_read(repository):
            status = 401 if self.headers.get("Authorization") is None else 403
            raise _Refused(status, "GatedRepo", f"Access to model {name} is restricted.")
        path = folder / self.file
        if self.file in repository.lost or not path.is_file():
            raise _Refused(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not self.file.endswith(IN_STORAGE):
            self._send_file(path, {**headers, "ETag": f'"{_git_oid(path)}"'})
            return
        digest = self.hub.store(path)
        headers |= {"X-Linked-Size": str(path.stat().st_size), "X-Linked-ETag": f'"{digest}"'}
        location = f"{self.hub.storage_url}/{digest}/{quote(self.file)}"
        self._send(HTTPStatus.FOUND, b"", {**headers, "Location": location})

    def _from_storage(self, path: str) -> None:
        digest, _, self.file = path.strip("/").partition("/")
        stored = self.hub.stored(digest)
        if stored is None:
            raise _Refused(404, "", "No such object")
        self._send_file(stored, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"})

    # --- answers ---

    def _send_json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send_file(self, path: Path, headers: dict[str, str]) -> None:
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(200, content, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if first > last:
            raise _Refused(416, "", "Requested range not satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        is_content = self.command == "GET" and status in (200, 206)
        fault = self.hub.fault(self.file, len(content)) if is_content else None
        body = b"" if self.command == "HEAD" else content[: fault.after] if fault else content
        # before the answer: whoever has it finds it in the log
        authorized = self.headers.get("Authorization") is not None
        asked = (self.command, self.file, self.path, self.headers.get("Range"), authorized)
        self.hub.note(Request(*asked, int(status), len(body)))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(body)
        if fault:
            self.close_connection = True
            if fault.held:
                self.hub.wait_until_healed()


def _git_oid(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _listing(folder: Path, directories: bool = False) -> dict[str, Path]:
    """Path in the repository -> file, or folder with `directories`, by name."""
    found = sorted(folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path for path in found if directories or path.is_file()}
