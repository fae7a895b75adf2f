"""A server without a model that answers as SGLang does: `python fake_server.py WAY ... PORT`.

`dies` and `hangs` before it serves; `fails` refuses to generate; `refuses` streams an error; `short` answers with a
token too few; `trickles` never ends a line; `stalls` answers only streams; `serves` does what is asked.
"""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAY = sys.argv[1]
lock = threading.Lock()
counts = {"together": 0, "most": 0}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(200, b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def chunk(self, text: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text))
        self.wfile.flush()

    def whole(self, event: bytes) -> None:
        with lock:
            counts["together"] += 1
            counts["most"] = max(counts["most"], counts["together"])
            print("together", counts["most"], flush=True)
        time.sleep(60 if WAY == "stalls" else 0.2)
        with lock:
            counts["together"] -= 1
        self.answer(200, event)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        new = request["sampling_params"]["max_new_tokens"] - (WAY == "short")
        event = json.dumps({"text": "", "meta_info": {"completion_tokens": new}}).encode()
        if WAY == "fails":
            self.answer(500, b"no memory")
        elif not request["stream"]:
            self.whole(event)
        else:
            self.stream(event, len(request["input_ids"]))

    def stream(self, event: bytes, tokens: int) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while WAY == "trickles":
            self.chunk(b"d")
            time.sleep(0.05)
        time.sleep(tokens / 10_000)
        self.chunk(b": a comment\n\n")
        event = b'{"error": {"message": "too long"}}' if WAY == "refuses" else event
        self.chunk(b"data: " + event + b"\n\n")
        time.sleep(tokens / 6_000)
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")


class Listener(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


if __name__ == "__main__":
    if WAY == "dies":
        sys.exit("no GPU")
    if WAY == "hangs":
        time.sleep(60)
    child = subprocess.Popen(["sleep", "60"])
    print("child", child.pid, flush=True)
    if os.environ.get("SGLANG_MOE_EXT_DISABLE") != "1":
        for second in range(2):
            line = "sglang-moe-ext 1.0 is active in SGLang 0.5.15, by the entry point"
            print(f"[2026-11-26 02:00:0{second}] {line}", flush=True)
    Listener(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
