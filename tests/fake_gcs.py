"""An object store in memory that speaks as much of Google Cloud Storage's JSON API as gcsfs,
tensorstore and google-cloud-storage use: no emulator on PyPI keeps preconditions, and none fails
when it is told to."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

PAGE = 5  # objects of a listing's page


class FakeGCS:
    """objects: {name: bytes} of its one bucket, "bucket". refuse: "METHOD path" -> status or None,
    which is answered in place of what was asked."""

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.generations: dict[str, int] = {}
        self.asked: list[str] = []
        self.refuse = lambda request: None
        self.uploads: dict[str, tuple[str, bytearray, dict]] = {}
        self.lock, self.count = threading.RLock(), 1_700_000_000_000_000

    def put(self, name: str, data: bytes) -> None:
        with self.lock:
            self.count += 1
            self.objects[name], self.generations[name] = bytes(data), self.count

    def remove(self, name: str) -> None:
        with self.lock:
            del self.objects[name], self.generations[name]

    def entry(self, name: str) -> dict:
        data = self.objects[name]
        crc = base64.b64encode(google_crc32c.Checksum(data).digest()).decode()
        return {
            "kind": "storage#object",
            "bucket": "bucket",
            "name": name,
            "size": str(len(data)),
            "crc32c": crc,
            "generation": str(self.generations[name]),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "updated": "2026-01-02T03:04:05.678Z",
            "timeCreated": "2026-01-02T03:04:05.678Z",
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1  # with Nagle's algorithm two packets wait
    store: FakeGCS

    def log_message(self, *args) -> None:
        pass

    def _handle(self) -> None:
        store, url = self.store, urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {unquote(url.path)}"
        with store.lock:
            store.asked.append(asked)
            if status := store.refuse(asked):
                return self._fail(status, "refused")
            found = re.fullmatch(
                r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(/.*)?)?", url.path
            )
            if not found or found[1] != "bucket":
                return self._fail(404, "no such bucket")
            if url.path.endswith("/b/bucket"):
                return self._json({"kind": "storage#bucket", "name": "bucket", "id": "bucket"})
            if url.path.startswith("/upload"):
                return self._upload()
            if not found[2]:
                return self._list()
            name, _, target = found[2][1:].partition("/rewriteTo/b/bucket/o/")
            name, _, moved = name.partition("/moveTo/o/")
            name = unquote(name)
            if name not in store.objects:
                return self._fail(404, "no such object")
            if not self._allowed(name):
                return None
            if target or moved:
                store.put(new := unquote(target or moved), store.objects[name])
                if moved:
                    store.remove(name)
                    return self._json(store.entry(new))
                return self._json({"done": True, "resource": store.entry(new)})
            if self.command == "DELETE":
                store.remove(name)
                return self._answer(204, b"")
            if self.query.get("alt") == "media":
                return self._media(name)
            return self._json(store.entry(name))

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _allowed(self, name: str) -> bool:
        now = str(self.store.generations.get(name, 0))
        if self.query.get("ifGenerationMatch", now) != now:
            self._fail(412, "precondition")
        elif self.query.get("ifGenerationNotMatch") == now:
            self._fail(304 if self.command == "GET" else 412, "precondition")
        else:
            return True
        return False

    def _list(self) -> None:
        prefix, cut = self.query.get("prefix", ""), self.query.get("delimiter", "")
        names, folders = [], set()
        for name in sorted(self.store.objects):
            if not name.startswith(prefix) or name < self.query.get("startOffset", ""):
                continue
            if "endOffset" in self.query and name >= self.query["endOffset"]:
                continue
            head, found, _ = name[len(prefix) :].partition(cut) if cut else (name, "", "")
            folders |= {prefix + head + cut} if found else set()
            names += [] if found else [name]
        both = sorted([*names, *folders])
        begin = int(self.query.get("pageToken", 0))
        end = begin + min(PAGE, int(self.query.get("maxResults", PAGE)))
        page = both[begin:end]
        answer = {"kind": "storage#objects", "items": [], "prefixes": []}
        answer["items"] = [self.store.entry(name) for name in page if name not in folders]
        answer["prefixes"] = [name for name in page if name in folders]
        if end < len(both):
            answer["nextPageToken"] = str(end)
        self._json(answer)

    def _upload(self) -> None:
        store, kind = self.store, self.query.get("uploadType")
        if self.command == "PUT" or "upload_id" in self.query:
            return self._resume()
        name, data = self.query.get("name"), self.body
        if kind == "multipart":
            mark = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1]
            _, first, rest = data.split(b"--" + mark.encode(), 2)
            name = json.loads(first.split(b"\r\n\r\n" if b"\r\n\r\n" in first else b"\n\n", 1)[1])
            name, split = name["name"], b"\r\n\r\n" if b"\r\n\r\n" in rest else b"\n\n"
            data = rest.split(split, 1)[1].rsplit(b"\n--" + mark.encode(), 1)[0]
            data = data.removesuffix(b"\r") if split == b"\r\n\r\n" else data
        elif kind == "resumable":
            name = json.loads(data)["name"] if name is None else name
            number = str(len(store.uploads))
            store.uploads[number] = (name, bytearray(), self.query)
            host = f"http://{self.headers['Host']}{urlsplit(self.path).path}"
            place = f"{host}?uploadType=resumable&upload_id={number}"
            return self._answer(200, b"{}", {"Location": place})
        if self._allowed(name):
            store.put(name, data)
            self._json(store.entry(name))

    def _resume(self) -> None:
        name, data, query = self.store.uploads[self.query["upload_id"]]
        data += self.body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self._answer(308, b"", {"Range": f"bytes=0-{len(data) - 1}"})
        self.query = query
        if self._allowed(name):
            self.store.put(name, data)
            self._json(self.store.entry(name))

    def _media(self, name: str) -> None:
        data = self.store.objects[name]
        headers = {"x-goog-generation": str(self.store.generations[name])}
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not found:
            return self._answer(200, data, headers)
        last = len(data) - 1
        begin = int(found[1]) if found[1] else max(len(data) - int(found[2]), 0)
        end = min(int(found[2]), last) if found[1] and found[2] else last
        if begin > last:
            return self._fail(416, "range")
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
        return self._answer(206, data[begin : end + 1], headers)

    def _json(self, value: dict) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, text: str) -> None:
        error = {"error": {"code": status, "message": text, "errors": [{"reason": text}]}}
        self._answer(status, b"" if status == 304 else json.dumps(error).encode())

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


@contextmanager
def serve() -> Iterator[tuple[FakeGCS, dict[str, str]]]:
    """The store, and the environment in which its clients find it, in this process or another."""
    store = FakeGCS()
    handler = type("Handler", (Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *about: None  # a client that went away
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield (
            store,
            {
                "STORAGE_EMULATOR_HOST": url,
                "TENSORSTORE_GCS_HTTP_URL": url,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
                "GOOGLE_CLOUD_PROJECT": "test",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks servers of its own
                "FSSPEC_GCS_TOKEN": "anon",
            },
        )
    finally:
        server.shutdown()
        server.server_close()
