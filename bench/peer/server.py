"""The peer of the benchmark: the same handler behind Python's own HTTP server, in an ordinary container.

server.py HANDLER [PORT]: serves `module.function`, looked for in the directory SOCK_PEER_SOURCE.
"""

import importlib
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

sys.path.insert(0, os.environ["SOCK_PEER_SOURCE"])
module, _, name = sys.argv[1].rpartition(".")
handle = getattr(importlib.import_module(module), name)


class Server(ThreadingHTTPServer):
    # The default of 5 would make a burst of connections wait for repeated SYNs.
    request_queue_size = 128


class Peer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body in one segment, sent at once: without it a kept connection waits for delayed acknowledgements.
    wbufsize = -1
    disable_nagle_algorithm = True

    def answer(self):
        url = urlsplit(self.path)
        event = {
            "method": self.command,
            "path": url.path,
            "query": dict(parse_qsl(url.query)),
            "headers": {key.lower(): value for key, value in self.headers.items()},
            "body": self.rfile.read(int(self.headers.get("content-length", 0))),
        }
        result = handle(event, None)
        status, headers = 200, {}
        if isinstance(result, dict) and "statusCode" in result:
            status, headers, result = result["statusCode"], result.get("headers", {}), result.get("body")
        if isinstance(result, str):
            result = result.encode()
        elif not isinstance(result, bytes):
            result = json.dumps(result).encode()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("content-length", str(len(result)))
        self.end_headers()
        self.wfile.write(result)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_):
        pass


Server(("", int(sys.argv[2]) if len(sys.argv) > 2 else 8080), Peer).serve_forever()
