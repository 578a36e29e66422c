"""The server of a remote scorer: one scorer behind HTTP, one request at a time."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from safetensors.torch import save

from fewstep.evaluation.scorers.remote import CARD_PATH, SCORE_PATH, card_to_json, decode_request
from fewstep.evaluation.scorers.scorer import Scorer, score

LOOPBACK = "127.0.0.1"
MAX_BYTES, PART = 2**30, 2**20


class ScorerServer(ThreadingHTTPServer):
    """Serves `scorer` on `host`:`port`; port 0 takes a free one (`server.server_port`).

    It listens on this machine alone unless another `host` is named: there is no password. Requests are scored one after
    the other on `device`, `chunk` samples at a time; requests larger than `max_bytes` are refused and not kept.
    `serve_forever()` runs it, `shutdown()` from another thread ends it.
    """

    daemon_threads = True

    def __init__(
        self,
        scorer: Scorer,
        port: int,
        *,
        host: str = LOOPBACK,
        device: str = "cpu",
        chunk: int | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.scorer, self.device, self.chunk, self.max_bytes = scorer, device, chunk, max_bytes
        self.busy = threading.Lock()
        super().__init__((host, port), ScorerHandler)


class ScorerHandler(BaseHTTPRequestHandler):
    """GET /card gives the scorer's card as JSON, POST /score scores; wrong input is 400, a broken scorer 500."""

    server: ScorerServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if self.path != CARD_PATH:
            self._answer(404, f"{self.path} is nothing; GET {CARD_PATH} or POST {SCORE_PATH}".encode())
        else:
            self._answer(200, card_to_json(self.server.scorer.card))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != SCORE_PATH:
            return self._answer(404, f"{self.path} is nothing; GET {CARD_PATH} or POST {SCORE_PATH}".encode())
        if not length.isdigit():
            return self._answer(411, b"a request without its length")
        if int(length) > self.server.max_bytes:
            # A client that is still sending would miss the answer and see a broken connection.
            self._drop(int(length))
            return self._answer(413, f"a request of {length} bytes; allowed {self.server.max_bytes}".encode())
        body = self.rfile.read(int(length))
        try:
            pixels, prompts = decode_request(body)
            with self.server.busy:
                scores = score(
                    self.server.scorer, pixels.to(self.server.device), prompts, chunk=self.server.chunk
                ).cpu()
        except ValueError as error:
            return self._answer(400, str(error).encode())
        except Exception as error:
            # The client is told and the server lives: one bad batch must not end the rewards of a run.
            return self._answer(500, f"{type(error).__name__}: {error}".encode())
        return self._answer(200, save({"scores": scores.contiguous()}))

    def _drop(self, length: int) -> None:
        while length > 0 and (part := self.rfile.read(min(length, PART))):
            length -= len(part)

    def _answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Successes are silent; failures are told to the client."""
