"""Servers on loopback that answer as a test wants, well or badly."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np


class Fake:
    """A server whose `answer(path, body)` gives (status, object or bytes); it can be stopped and
    started again where it was. `requests` has (path, body, headers, time) of each request."""

    def __init__(self, answer, port=0):
        self.answer, self.requests = answer, []
        self.start(port)

    def start(self, port=None):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.do_POST()

            def do_POST(self):
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                fake.requests.append((self.path, body, self.headers, time.monotonic()))
                status, found = fake.answer(self.path, body)
                if callable(found):
                    found(self)
                    return
                data = found if isinstance(found, bytes) else json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_):  # clients that have given up
                pass

        self.server = Server(("127.0.0.1", self.port if port is None else port), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def bodies(self, path):
        return [body for at, body, *_ in self.requests if at == path]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


HEALTH = {"name": "fake", "version": "1", "scores": ["good", "fair"]}


def value(id: int) -> dict:
    """The scores that a fake reward gives to a sample."""
    return {"good": id / 8, "fair": -id / 4}


def scored(body, version="1") -> dict:
    """The right answer of a fake reward, in the order of the request."""
    return {"version": version, "samples": [
        {"id": s["id"], "scores": value(s["id"])} for s in body["samples"]]}


def scorer(change=lambda answer: answer):
    """An `answer` of a fake reward that answers rightly but for a change."""

    def answer(path, body):
        return (200, HEALTH) if path == "/health" else (200, change(scored(body)))

    return answer


def pictures(ids, side=4) -> np.ndarray:
    """A picture of noise for each id, uint8 [n, side, side, 3]."""
    noise = [np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8) for i in ids]
    return np.array(noise, np.uint8).reshape(-1, side, side, 3)
