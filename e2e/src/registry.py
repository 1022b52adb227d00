"""Serves an OCI image layout as a container registry does (OCI distribution specification, pulling only).

registry.py PORT DIRECTORY: under any host, and under the names that the layout's index has behind theirs.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LAYOUT = Path(sys.argv[2])
MANIFESTS = {}
TYPES = {}


def load():
    for manifest in json.loads((LAYOUT / "index.json").read_text())["manifests"]:
        name = manifest["annotations"]["io.containerd.image.name"].partition("/")[2]
        MANIFESTS[name] = manifest["digest"]
        TYPES[manifest["digest"]] = manifest["mediaType"]


class Registry(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.partition("?")[0].removeprefix("/v2/").rsplit("/", 2)
        if parts == [""]:
            return self.answer(200, b"{}", "application/json")
        name, _, reference = parts if len(parts) == 3 else ("", "", "")
        digest = MANIFESTS.get(f"{name}:{reference}", reference)
        blob = LAYOUT / "blobs" / digest.replace(":", "/")
        if not digest.startswith("sha256:") or not blob.is_file():
            return self.answer(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}', "application/json")
        self.answer(200, blob.read_bytes(), TYPES.get(digest, "application/octet-stream"), digest)

    def answer(self, status, body, kind, digest=""):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if digest:
            self.send_header("Docker-Content-Digest", digest)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


load()
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Registry).serve_forever()
