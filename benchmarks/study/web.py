# SPDX-License-Identifier: Apache-2.0
"""A web server with a cache: /put?k=N, /get?k=N, /count."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

cache: dict[str, dict] = {}
count = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        global count
        count += 1
        path, _, key = self.path.partition("?k=")
        if path == "/count":
            body = str(count)
        elif path == "/put":
            cache[key] = {"key": key, "n": count, "words": [f"{key}-{n}" for n in range(20)]}
            body = "ok"
        else:
            body = json.dumps(cache.get(key, {}))
        data = body.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
