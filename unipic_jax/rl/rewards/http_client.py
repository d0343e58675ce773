"""Scoring servers: the client of what `wire` describes, over HTTP that never waits for ever."""

import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from unipic_jax.core.errors import InputError
from unipic_jax.rl.rewards import wire
from unipic_jax.rl.rewards.host import Answer, BadAnswer, Health, Sample, Score, Unavailable

MOST_BYTES = 2**26  # of an answer


@dataclasses.dataclass(frozen=True)
class Connection:
    """Where a server is, and how patient its client is with it.

    An attempt that finds nobody, breaks off or is told to come again (429, 5xx) is repeated up to
    `retries` times after `backoff`, 2 `backoff`, 4 `backoff`, ... seconds. One that takes longer
    than `timeout` seconds is not: what is slow would be slower still with twice the work.
    """

    url: str  # of the server: http://host:port, with a path before its own if need be
    timeout: float = 60.0  # seconds of an attempt
    retries: int = 3
    backoff: float = 0.5  # seconds
    token: str = dataclasses.field(default="", repr=False)  # sent as a bearer's

    def __post_init__(self):
        try:
            parts = urlsplit(self.url)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise InputError(f"{self.url!r} is not the address of a server; write http://host:port")
        if self.timeout <= 0 or self.retries < 0 or self.backoff < 0:
            raise InputError("the timeout of a server must be positive, and its retries and "
                             "backoff not negative")
        if not (self.token.isascii() and self.token.strip().isprintable()):
            raise InputError("the token of a server must be one line of ASCII")

    def call(self, path: str, body: dict | None = None) -> dict:
        """The JSON object that the server answers: to a POST of a body, or else to a GET.

        Raises Unavailable and BadAnswer.
        """
        url = self.url.rstrip("/") + path
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token.strip()}"
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                status, found = _exchange(url, data, headers, self.timeout)
            except TimeoutError:
                raise Unavailable(f"{url} gives no answer in {self.timeout:g} s") from None
            except (OSError, http.client.HTTPException) as e:
                # The words of an OSError are in strerror; those of the others may be many lines.
                problem = getattr(e, "strerror", None) or type(e).__name__
                continue
            if status < 500 and status != 429:
                return _object(url, status, found)
            problem = f"status {status}{_reason(found)}"
        raise Unavailable(f"{url} cannot be used: {problem}")


@dataclasses.dataclass(frozen=True)
class Remote:
    """The scorer that a server is."""

    connection: Connection

    def health(self) -> Health:
        """What the server says of itself."""
        found = self.connection.call("/health")
        name, version, scores = (found.get(k) for k in ("name", "version", "scores"))
        if not (isinstance(name, str) and isinstance(version, str) and isinstance(scores, list)
                and all(isinstance(s, str) for s in scores)):
            raise BadAnswer(f"{self.connection.url}/health names no reward")
        return Health(name, version, tuple(scores))

    def score(self, samples: Sequence[Sample]) -> Answer:
        """Their scores, as the server sends them."""
        version, entries = self.ask("/score", samples)
        return Answer(version, [
            Score(e["id"], None, str(e["error"])) if "error" in e
            else Score(e["id"], _mapping(e.get("scores"))) for e in entries])

    def ask(self, path: str, samples: Sequence[Sample]) -> tuple[str, list[dict]]:
        """The version of the server, and what it sends of each sample, by "id"."""
        found = self.connection.call(path, wire.samples_to_json(samples))
        version, entries = found.get("version"), found.get("samples")
        if not isinstance(version, str) or not isinstance(entries, list) or not all(
                isinstance(e, dict) and type(e.get("id")) is int for e in entries):
            raise BadAnswer(f"{self.connection.url}{path} answers without version and samples")
        return version, entries


def _mapping(scores) -> dict:
    if not isinstance(scores, dict):
        raise BadAnswer("an answer has neither scores nor an error for a sample")
    return scores


def _exchange(
    url: str, data: bytes | None, headers: Mapping[str, str], timeout: float
) -> tuple[int, bytes]:
    """Status and body of one request; TimeoutError where all of it takes longer than that."""
    parts = urlsplit(url)
    kind = (http.client.HTTPSConnection if parts.scheme == "https"
            else http.client.HTTPConnection)
    began = time.monotonic()
    connection = kind(parts.hostname, parts.port, timeout=timeout)
    expired = threading.Event()
    alarm = None
    try:
        connection.connect()
        # The socket's own timeout begins anew with each byte that comes.
        alarm = threading.Timer(began + timeout - time.monotonic(), _hang_up,
                                (connection.sock, expired))
        alarm.daemon = True
        alarm.start()
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request("GET" if data is None else "POST", target, data, headers)
        with connection.getresponse() as response:
            found = response.read(MOST_BYTES + 1)
            if response.length and len(found) <= MOST_BYTES:  # a part read so is no error to it
                raise http.client.IncompleteRead(found)
        if expired.is_set():
            raise TimeoutError
        return response.status, found
    except (OSError, http.client.HTTPException, ValueError):
        if expired.is_set():  # however the end of the connection came to light
            raise TimeoutError from None
        raise
    finally:
        if alarm:
            alarm.cancel()
        connection.close()


def _hang_up(sock: socket.socket, expired: threading.Event):
    expired.set()
    with contextlib.suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)


def _object(url, status, found: bytes) -> dict:
    if not 200 <= status < 300:
        raise BadAnswer(f"{url} answers with status {status}{_reason(found)}")
    if len(found) > MOST_BYTES:
        raise BadAnswer(f"{url} answers with more than {MOST_BYTES >> 20} MiB")
    try:
        found = json.loads(found)
    except (ValueError, RecursionError):
        raise BadAnswer(f"{url} answers with malformed JSON") from None
    if not isinstance(found, dict):
        raise BadAnswer(f"{url} does not answer with a JSON object")
    return found


def _reason(found: bytes) -> str:
    """": " and the error that a body has, on one line; nothing where there is none."""
    try:
        error = json.loads(found)["error"]
        error = error["message"] if isinstance(error, dict) else error  # as OpenAI has it
    except (ValueError, RecursionError, TypeError, KeyError):
        return ""
    return ": " + " ".join(str(error).split())[:200]
