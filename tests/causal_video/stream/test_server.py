"""The page over HTTP: steering, prompts, snapshots, and requests that are refused."""

import base64
import io
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from fewstep.causal_video.stream import server as server_module
from fewstep.causal_video.stream.page import PAGE
from fewstep.causal_video.stream.play import World
from fewstep.causal_video.stream.server import LONGEST_BODY, WorldServer
from tests.causal_video.tiny_streams import NAMES, action_pipeline

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture
def server() -> Iterator[WorldServer]:
    """A world of actions on a free port."""
    with WorldServer(World(action_pipeline(), "a red cat")) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(server: WorldServer, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
    """The JSON answer; a body makes it a POST."""
    content = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    all_headers = {"Content-Type": "application/json"} | (headers or {})
    with urlopen(Request(server.url + path, content, all_headers), timeout=60) as answer:
        return json.loads(answer.read())


def refused(server: WorldServer, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
    """Status and message of a request that is refused."""
    with pytest.raises(HTTPError) as caught:
        ask(server, path, body, headers)
    with caught.value as error:
        return error.code, json.loads(error.read())["error"]


def test_a_video_is_played_over_http(server: WorldServer) -> None:
    status = ask(server, "status")
    assert (status["chunk"], status["actions"], status["size"], status["rate"]) == (0, list(NAMES), [32, 32], 16)
    session = action_pipeline().open("a red cat")
    for action in ("left", "none"):
        made = ask(server, "step", {"action": action})
        images = session.step(action).images()
        assert len(made["frames"]) == len(images)
        picture = Image.open(io.BytesIO(base64.b64decode(made["frames"][-1])))
        assert picture.format == "PNG"
        assert picture.tobytes() == images[-1].tobytes()
        assert made["seconds"] > 0
    number = ask(server, "snapshot", {})["number"]
    session.set_prompt("two dogs", "hard")
    assert ask(server, "prompt", {"prompt": "two dogs", "mode": "hard"})["prompt"] == "two dogs"
    made = ask(server, "step", {"action": "up"})
    assert made["chunk"] == 2
    assert len(made["frames"]) == 1
    assert (
        Image.open(io.BytesIO(base64.b64decode(made["frames"][0]))).tobytes()
        == session.step("up").images()[0].tobytes()
    )
    status = ask(server, "restore", {"number": number})
    assert (status["chunk"], status["prompt"], status["snapshots"]) == (2, "a red cat", [number])
    assert ask(server, "reset", {"seed": 3})["chunk"] == 0


def test_mistakes_are_answered_and_change_nothing(server: WorldServer) -> None:
    ask(server, "step", {"action": "left"})
    before = ask(server, "status")
    for path, body, message in (
        ("step", {"action": "jump"}, "unknown action 'jump'"),
        ("step", {"action": 1}, "action must be of type str"),
        ("prompt", {}, "prompt must be of type str"),
        ("prompt", {"prompt": "a", "mode": "soft"}, "mode must be"),
        ("restore", {"number": 5}, "there is no snapshot 5"),
        ("restore", {"number": True}, "number must be of type int"),
        ("step", [], "must be a JSON object"),
        ("step", b"{", "Expecting"),
        ("step", b" " * (LONGEST_BODY + 1), "a body has a length of at most"),
    ):
        code, said = refused(server, path, body)
        assert code == 400
        assert message in said
    assert refused(server, "nowhere", {})[0] == 404
    assert refused(server, "nowhere")[0] == 404
    assert ask(server, "status") == before


def test_other_machines_and_other_pages_are_refused(server: WorldServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    for headers in ({"Host": "example.org"}, {"Origin": "http://example.org"}, {"Origin": "null"}):
        assert refused(server, "step", {}, headers)[0] == 403
        assert refused(server, "status", None, headers)[0] == 403
    assert "content type" in refused(server, "step", {}, {"Content-Type": "text/plain"})[1]
    own = {"Origin": server.url.rstrip("/")}
    assert ask(server, "status", None, own)["chunk"] == 0


def test_the_page_needs_no_other_source(server: WorldServer) -> None:
    with urlopen(server.url, timeout=60) as answer:
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        page = answer.read().decode()
    assert "http://" not in page
    assert "https://" not in page
    for part in ('id="screen"', "/step", "/prompt", "/reset", "/snapshot", "/restore", "prefers-color-scheme: dark"):
        assert part in page


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="needs a Chromium on the path")
@pytest.mark.slow
def test_a_browser_plays_it(server: WorldServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a player does: hold an arrow key, and take a snapshot later on.
    keys = "dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))"
    hands = f"<script>setTimeout(() => {keys}, 300); setTimeout(() => $('save').click(), 5000)</script></body>"
    monkeypatch.setattr(server_module, "PAGE", PAGE.replace("</body>", hands))
    browser = next(path for path in map(shutil.which, BROWSERS) if path is not None)
    picture = tmp_path / "page.png"
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,700", "--virtual-time-budget=8000")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = (browser, *options, profile, f"--screenshot={picture}", server.url)
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    assert Image.open(picture).size == (900, 700)
    # The page asked for chunks by itself, and the key reached the network.
    status = ask(server, "status")
    assert status["chunk"] > 0
    assert status["snapshots"] == [1]
    state = server.world.snapshot(server.world.save())
    assert state.pending is not None
    assert state.pending.condition.extra is not None
    assert state.pending.condition.extra[0, :, 0, 0, 0].tolist() == [0, 1, 0, 0]
