"""A Hugging Face hub on this machine, for tests: the requests that huggingface_hub makes, answered from memory.

Two servers, as in reality: the hub, which lists a repository and sends whoever wants a file on to the second, the one
that has the bytes and honours `Range`. Faults are switched on by the attributes of `Hub`.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Request:
    """A request that one of the two servers got."""

    server: str  # "hub" or "bytes"
    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Hub:
    files: dict[str, bytes]
    token: str | None = None  # where set, whoever has it not gets 401
    listing: bytes | None = None  # in place of the listing of `files`
    listing_status: int = 200
    file_status: int = 200
    cuts: list[int] = field(default_factory=list)  # body bytes after which the next answers break off, in turn
    ranges: bool = True  # whether Range is honoured
    sent: dict[str, bytes] = field(default_factory=dict)  # what is sent in place of the file that is listed
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, name)) for name in ("hub", "bytes")]
        self.url, self.bytes_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def of_bytes(self) -> list[Request]:
        return [request for request in self.requests if request.server == "bytes"]


def _handler(hub: Hub, name: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            headers = self.headers
            hub.requests.append(Request(name, self.command, self.path, headers["Range"], headers["Authorization"]))
            if name == "bytes":
                self.send_bytes(path.removeprefix("/"))
            elif hub.token and headers["Authorization"] != f"Bearer {hub.token}":
                # What the hub says to a wrong token.
                self.answer(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
            elif "/resolve/" in path:
                self.send_on(path.rsplit("/", 1)[1])
            elif hub.listing_status != 200:
                code = {"X-Error-Code": "RepoNotFound"} if hub.listing_status == 404 else {}
                self.answer(hub.listing_status, b"{}", code)
            elif path == "/api/datasets/kjj0/fineweb10B-gpt2/revision/main":
                self.answer(200, hub.listing or listing(hub.files), {"Content-Type": "application/json"})
            else:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def send_on(self, file: str) -> None:
            if hub.file_status != 200 or file not in hub.files:
                code = {"X-Error-Code": "EntryNotFound"} if hub.file_status in (200, 404) else {}
                self.answer(hub.file_status if hub.file_status != 200 else 404, b"{}", code)
                return
            content = hub.files[file]
            self.answer(
                302,
                b"",
                {
                    "Location": f"{hub.bytes_url}/{file}",
                    "X-Repo-Commit": COMMIT,
                    "X-Linked-Size": str(len(content)),
                    "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                },
            )

        def send_bytes(self, file: str) -> None:
            content = hub.sent.get(file, hub.files[file])
            asked = self.headers["Range"]
            begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and hub.ranges else 0
            if asked and begin >= len(content):
                self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            body = content[begin:]
            self.send_response(206 if asked and hub.ranges else 200)
            self.send_header("Content-Length", str(len(body)))
            if asked and hub.ranges:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            cut = hub.cuts.pop(0) if hub.cuts else len(body)
            self.wfile.write(body[:cut])
            if cut < len(body):
                self.close_connection = True

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def listing(files: dict[str, bytes]) -> bytes:
    """The hub's answer about a data set with `blobs=true`, as far as anybody reads it."""
    content = {
        "id": "kjj0/fineweb10B-gpt2",
        "sha": COMMIT,
        "siblings": [
            {"rfilename": "README.md", "size": 10, "blobId": "0" * 40},
            *(
                {
                    "rfilename": name,
                    "size": len(content),
                    "blobId": "1" * 40,
                    "lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134},
                }
                for name, content in files.items()
            ),
        ],
    }
    return json.dumps(content).encode()
