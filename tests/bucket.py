"""A Google Cloud Storage bucket on this machine: the part of the API that TensorStore and gcsfs use.

The emulators on the package index ignore generations, by which TensorStore changes a file that others read.
"""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "bucket"


@dataclass
class Bucket:
    """The objects, by name: content and generation. ``address`` is that of the server."""

    address: str = ""
    objects: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    uploads: dict[str, tuple[str, str, bytes]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: count(1))
    lock: threading.RLock = field(default_factory=threading.RLock)

    def variables(self) -> dict[str, str]:
        """Returns the environment in which programs find this bucket in place of Google's."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "no_proxy": "127.0.0.1",
        }

    def generation(self, name: str) -> int:
        """Returns the generation of an object, 0 if it is not there."""
        return self.objects[name][1] if name in self.objects else 0

    def resource(self, name: str) -> dict[str, Any]:
        """Returns what the API says of an object."""
        content, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": NAME,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "updated": "2026-01-01T00:00:00Z",
            "timeCreated": "2026-01-01T00:00:00Z",
        }


@contextmanager
def serving() -> Iterator[Bucket]:
    """Serves an empty bucket on the loopback address."""
    bucket = Bucket()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"bucket": bucket}))
    bucket.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of programs that are gone before the answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and content in one packet

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        name, query = self._object()
        with self.bucket.lock:
            if name is None:
                self._json({"kind": "storage#objects", **self._listing(query)})
            elif name not in self.bucket.objects:
                self._reply(HTTPStatus.NOT_FOUND)
            elif query.get("alt") != "media":
                self._json(self.bucket.resource(name))
            elif query.get("ifGenerationNotMatch") == str(self.bucket.generation(name)):
                self._reply(HTTPStatus.NOT_MODIFIED)
            elif "ifGenerationMatch" in query and not self._matches(name, query):
                self._reply(HTTPStatus.PRECONDITION_FAILED)
            else:
                self._media(name)

    def do_POST(self) -> None:
        name, query = self._object()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.bucket.lock:
            if name is not None and "/rewriteTo/" in name:
                source, target = name.split(f"/rewriteTo/b/{NAME}/o/")
                self._write(target, self.bucket.objects[source][0], query, done=True)
            elif name is not None and "/moveTo/" in name:
                source, target = name.split("/moveTo/o/")
                self._write(target, self.bucket.objects.pop(source)[0], query)
            elif query.get("uploadType") == "media":
                self._write(query["name"], body, query)
            elif query.get("uploadType") == "multipart":
                mark = b"--" + self.headers["Content-Type"].partition("boundary=")[2].strip("\"'").encode()
                described, content = (part.lstrip(b"\r\n") for part in body.split(mark)[1:3])
                values = json.loads(_after_headers(described))
                content = _after_headers(content).removesuffix(b"\n").removesuffix(b"\r")
                self._write(values["name"], content, query)
            elif query.get("uploadType") == "resumable":
                number = str(next(self.bucket.numbers))
                match = query.get("ifGenerationMatch", "")
                self.bucket.uploads[number] = (query["name"], match, b"")
                where = f"{self.bucket.address}/upload/storage/v1/b/{NAME}/o?upload_id={number}"
                self._reply(HTTPStatus.OK, b"", {"Location": where})
            elif "upload_id" in query:
                self._continue_upload(query["upload_id"], body)
            else:
                self._reply(HTTPStatus.NOT_IMPLEMENTED)

    do_PUT = do_POST

    def do_DELETE(self) -> None:
        name, query = self._object()
        with self.bucket.lock:
            if name not in self.bucket.objects:
                self._reply(HTTPStatus.NOT_FOUND)
            elif not self._matches(name, query):
                self._reply(HTTPStatus.PRECONDITION_FAILED)
            else:
                del self.bucket.objects[name]
                self._reply(HTTPStatus.NO_CONTENT)

    def _object(self) -> tuple[str | None, dict[str, str]]:
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        name = unquote(parts.path.partition(f"/b/{NAME}/o/")[2])
        return name or None, query

    def _matches(self, name: str, query: dict[str, str]) -> bool:
        wanted = query.get("ifGenerationMatch")
        return not wanted or int(wanted) == self.bucket.generation(name)

    def _write(self, name: str, content: bytes, query: dict[str, str], *, done: bool = False) -> None:
        if not self._matches(name, query):
            self._reply(HTTPStatus.PRECONDITION_FAILED)
            return
        self.bucket.objects[name] = content, next(self.bucket.numbers)
        resource = self.bucket.resource(name)
        self._json({"done": True, "resource": resource} if done else resource)

    def _continue_upload(self, number: str, body: bytes) -> None:
        name, match, before = self.bucket.uploads[number]
        content = before + body
        self.bucket.uploads[number] = name, match, content
        total = self.headers.get("Content-Range", "*/*").rpartition("/")[2]
        if total == "*" or len(content) < int(total):
            self._reply(HTTPStatus.PERMANENT_REDIRECT, b"", {"Range": f"bytes=0-{len(content) - 1}"})
        else:
            self._write(name, content, {"ifGenerationMatch": match})

    def _listing(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for name in sorted(self.bucket.objects):
            if not name.startswith(prefix):
                continue
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if cut:
                prefixes.add(prefix + head + delimiter)
            else:
                items.append(self.bucket.resource(name))
        return {"items": items, "prefixes": sorted(prefixes)}

    def _media(self, name: str) -> None:
        content, generation = self.bucket.objects[name]
        headers = {"x-goog-generation": str(generation), "x-goog-stored-content-length": str(len(content))}
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        if not asked:
            self._reply(HTTPStatus.OK, content, headers)
            return
        first, _, last = asked.partition("-")
        start = int(first) if first else len(content) - int(last)
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            self._reply(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            return
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._reply(HTTPStatus.PARTIAL_CONTENT, content[start:end], headers)

    def _json(self, values: dict[str, Any]) -> None:
        self._reply(HTTPStatus.OK, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _reply(self, status: HTTPStatus, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status != HTTPStatus.NOT_MODIFIED:
            self.wfile.write(body)


def _after_headers(part: bytes) -> bytes:
    """Returns the content of a part of a multipart body."""
    for end in (b"\r\n\r\n", b"\n\n"):
        if end in part:
            return part.partition(end)[2]
    return part
