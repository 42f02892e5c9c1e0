"""An HTTP server that takes any upload: what the simulated outside offers to who wants to get data out.

PUT and POST store the body and answer its size and SHA-256; GET answers a short page (``/health`` included) or
an uploaded file by its number. Standard library only. Each upload is a line in ``FOLDER/log.jsonl``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_CHUNK = 1 << 16
_LIMIT = 1 << 30  # bytes of one upload; the disk is 2 GiB


class Sink(ThreadingHTTPServer):
    """Listens on IPv4 and IPv6; numbers the uploads."""

    address_family = socket.AF_INET6
    daemon_threads = True

    def __init__(self, port: int, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.Lock()
        self.count = len(list(folder.glob("*.bin")))
        super().__init__(("::", port), Handler)

    def server_bind(self) -> None:
        """Take IPv4 connections too; skip the reverse look-up of the standard class."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "world", self.server_address[1]

    def next_number(self) -> int:
        """The number of a new upload, from 1."""
        with self.lock:
            self.count += 1
            return self.count

    def note(self, entry: dict[str, object]) -> None:
        """Append one line to the log."""
        with self.lock, (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")


class Handler(BaseHTTPRequestHandler):
    """Any path, any method that carries a body."""

    server: Sink
    protocol_version = "HTTP/1.1"
    timeout = 600

    def do_GET(self) -> None:
        """A short page; ``/uploads/N`` gives upload N back."""
        parts = self.path.strip("/").split("/")
        if len(parts) == 2 and parts[0] == "uploads" and parts[1].isdecimal():
            file = self.server.folder / f"{int(parts[1])}.bin"
            if file.is_file():
                self._answer(200, file.read_bytes(), "application/octet-stream")
                return
            self._answer(404, b"no such upload\n", "text/plain")
            return
        self._answer(200, b"the outside\n", "text/plain")

    def do_POST(self) -> None:
        """Store the body."""
        number = self.server.next_number()
        digest = hashlib.sha256()
        size = 0
        with (self.server.folder / f"{number}.bin").open("wb") as out:
            for chunk in self._body():
                size += len(chunk)
                if size > _LIMIT:
                    self.close_connection = True
                    self._answer(413, b"too large\n", "text/plain")
                    return
                digest.update(chunk)
                out.write(chunk)
        entry = {"at": time.time(), "from": self.client_address[0], "path": self.path[:1000], "number": number,
                 "size": size, "sha256": digest.hexdigest()}  # fmt: skip
        self.server.note(entry)
        self._answer(201, json.dumps(entry).encode() + b"\n", "application/json")

    do_PUT = do_POST  # noqa: N815 - the base class calls it by this name

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(100).split(b";")[0] or b"0", 16):
                left = size
                while left > 0:
                    chunk = self.rfile.read(min(_CHUNK, left))
                    if not chunk:
                        return
                    left -= len(chunk)
                    yield chunk
                self.rfile.readline(10)
            self.rfile.readline(10)
            return
        left = int(self.headers.get("Content-Length", "0"))
        while left > 0:
            chunk = self.rfile.read(min(_CHUNK, left))
            if not chunk:
                return
            left -= len(chunk)
            yield chunk

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Say nothing; uploads are noted in the log."""


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=80)
    parser.add_argument("--folder", type=Path, default=Path("/srv/upload"))
    args = parser.parse_args()
    Sink(args.port, args.folder).serve_forever()


if __name__ == "__main__":
    main()
