"""A page on this machine that plays a `World`: keys are sent with each request for frames, frames come back as PNG.

The page asks for the next chunk while it shows the last one, so nothing is computed when nobody looks, and the same
requests give the same video. Only this machine is served, and only pages of this server: requests with another host or
origin are refused, as are bodies that are no JSON, so that no other page in the browser can steer.

| request | body | answer |
|---|---|---|
| GET / | | the page |
| GET /status | | `WorldStatus` |
| POST /step | {"action": "left"} | {"chunk", "seconds", "frames": PNG files in base64} |
| POST /prompt | {"prompt": "...", "mode": "recache"} | `WorldStatus` |
| POST /reset | {"seed": 0} | `WorldStatus` |
| POST /snapshot | {} | `WorldStatus` and the "number" |
| POST /restore | {"number": 1} | `WorldStatus` |

Mistakes are answered with status 400 and {"error": what is wrong}, chunks that fail (out of memory) with 500.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from fewstep.causal_video.stream.page import PAGE
from fewstep.causal_video.stream.play import World
from fewstep.causal_video.stream.world import NONE

LOCALHOST = "127.0.0.1"
HOSTS = (LOCALHOST, "localhost")
LONGEST_BODY = 64 * 1024


class WorldServer(ThreadingHTTPServer):
    """Serves one `World` on 127.0.0.1; port 0 takes a free one, `server_port` says which."""

    daemon_threads = True

    def __init__(self, world: World, port: int = 0) -> None:
        self.world = world
        super().__init__((LOCALHOST, port), WorldHandler)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{LOCALHOST}:{self.server_port}/"


class WorldHandler(BaseHTTPRequestHandler):
    """One request."""

    server: WorldServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """The page, or the status."""
        if not self._is_local():
            return
        path = urlsplit(self.path).path
        if path == "/":
            self._send(HTTPStatus.OK, PAGE.encode("ascii"), "text/html; charset=utf-8")
        elif path == "/status":
            self._send_json(HTTPStatus.OK, asdict(self.server.world.status()))
        else:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": f"there is no {path}"})

    def do_POST(self) -> None:
        """A chunk, or a change."""
        if not self._is_local():
            return
        try:
            answer = self._answer(urlsplit(self.path).path, self._body())
        except ValueError as error:
            # What is left of a body that was not read would be taken for the next request.
            self.close_connection = True
            self._send_json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
            return
        except RuntimeError as error:
            # Out of memory, say: the stream is as it was, and the next request may do better.
            self._send_json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"the chunk failed: {error}"})
            return
        if answer is None:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": f"there is no {self.path}"})
        else:
            self._send_json(HTTPStatus.OK, answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Several lines per second tell nobody anything; errors are in the answers."""

    def _answer(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """What a request changes and gives; None for an unknown path. Raises ValueError for an unfit body."""
        world = self.server.world
        if path == "/step":
            made = world.step(field(body, "action", str, NONE))
            frames = [base64.b64encode(picture).decode("ascii") for picture in made.pictures]
            return {"chunk": made.chunk, "seconds": made.seconds, "frames": frames}
        number: dict[str, Any] = {}
        if path == "/prompt":
            world.set_prompt(field(body, "prompt", str, None), field(body, "mode", str, world.mode))
        elif path == "/reset":
            world.reset(field(body, "seed", int, 0))
        elif path == "/snapshot":
            number = {"number": world.save()}
        elif path == "/restore":
            world.restore(field(body, "number", int, None))
        else:
            return None
        return asdict(world.status()) | number

    def _is_local(self) -> bool:
        """Whether the request came to this server by its own name, from its own page or from no page; else 403."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        origin = self.headers.get("Origin")
        if host in HOSTS and (origin is None or urlsplit(origin).netloc == self.headers.get("Host")):
            return True
        self.close_connection = True
        self._send_json(HTTPStatus.FORBIDDEN, {"error": "this page is for the machine it runs on"})
        return False

    def _body(self) -> dict[str, Any]:
        """The JSON object that was sent. Raises ValueError for anything else."""
        if self.headers.get_content_type() != "application/json":
            raise ValueError("send JSON with the content type application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LONGEST_BODY:
            raise ValueError(f"a body has a length of at most {LONGEST_BODY} bytes, got {length or 'none'}")
        # json's own error, and that of bytes that are no text, are ValueErrors.
        body = json.loads(self.rfile.read(int(length)) or b"{}")
        if not isinstance(body, dict):
            raise ValueError(f"the body must be a JSON object, got {type(body).__name__}")
        return body

    def _send_json(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode("ascii"), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)


def field(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """A value of a body; a default of None makes it obligatory. Raises ValueError for another type or a lack."""
    value = body.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return value


def serve(world: World, *, port: int) -> None:
    """Serve until Ctrl-C."""
    with WorldServer(world, port) as server:
        print(f"open {server.url} in a browser on this machine; Ctrl-C ends", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")
