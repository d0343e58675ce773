"""A scorer as a server, for the clients of `http_client`; the protocol is in `wire`."""

import json
import logging
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from unipic_jax.core.errors import InputError
from unipic_jax.rl.rewards import wire
from unipic_jax.rl.rewards.host import BadAnswer, Scorer, Unavailable, check

MOST_BYTES = 2**28  # of a request
PATIENCE = 60  # seconds for a client to send its request

log = logging.getLogger(__name__)


class Server(ThreadingHTTPServer):
    """Listens from the start, and answers, each request by a thread, once `serve_forever` runs.

    Port 0 takes a free one; `url` says where it is. Raises InputError where the scorer is not
    ready or the address cannot be had.
    """

    daemon_threads = True
    request_queue_size = 128  # clients connect for each request, many at once

    def __init__(self, scorer: Scorer, host: str = "127.0.0.1", port: int = 0):
        try:
            self.scorer, self.health = scorer, scorer.health()
            super().__init__((host, port), _Handler)
        except (Unavailable, BadAnswer) as e:
            raise InputError(f"the reward is not ready: {e}") from None
        except (OSError, OverflowError) as e:
            reason = getattr(e, "strerror", None) or e
            raise InputError(f"cannot listen on {host}:{port}: {reason}; choose another port"
                             ) from None
        self.url = f"http://{host}:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        log.debug("a client broke off", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE

    def do_GET(self):
        if self.path == "/health":
            self._send(200, self.server.health._asdict())
        else:
            self._send(404, {"error": f"there is no {self.path}; ask for /health"})

    def do_POST(self):
        try:
            body = self._body()  # before any answer, which would be lost with what is not read
            if self.path != "/score":
                self._send(404, {"error": f"there is no {self.path}; post to /score"})
                return
            samples = wire.samples_from_json(body)
        except InputError as e:
            self._send(400, {"error": str(e)})
            return
        self._send(*_answer(self.server, samples))

    def _body(self):
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= MOST_BYTES:
            raise InputError(f"Content-Length must be a number up to {MOST_BYTES}")
        try:
            return json.loads(self.rfile.read(length))
        except (ValueError, RecursionError):
            raise InputError("the request is not JSON") from None

    def _send(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format, *args):
        log.debug("%s " + format, self.address_string(), *args)


def _answer(server, samples) -> tuple[int, dict]:
    try:
        answer = server.scorer.score(samples)
        check(answer.scores, [s.id for s in samples], server.health.scores)
    except Unavailable as e:  # of another server that it asks
        return 503, {"error": str(e)}
    except BadAnswer as e:
        return 502, {"error": str(e)}
    except Exception as e:  # a server goes on with the next request, whatever it was
        log.exception("a request has failed")
        return 500, {"error": f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"}
    return 200, {"version": answer.version, "samples": [
        wire.score_to_json(score) for score in answer.scores]}
