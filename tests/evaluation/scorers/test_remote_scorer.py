"""A scorer over HTTP on the loopback interface: same numbers, clear failures, nothing unpickled."""

import math
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fewstep.dmd.reward.scorers import ScorerChoice, make_scorer
from fewstep.embedded.digits.scorers import Slant, StrokeWeight
from fewstep.evaluation.scorers.remote import Patience, RemoteScorer, card_to_json, decode_request, encode_request
from fewstep.evaluation.scorers.remote_server import ScorerServer
from fewstep.evaluation.scorers.scorer import Scorer, ScorerCard, score

PIXELS, PROMPTS = torch.rand(5, 3, 8, 6, generator=torch.Generator().manual_seed(0)), ["a", "b \u00e4", "", "d", "e"]


class Moody:
    """Breaks, or answers with what a scorer must not answer, as the prompt says."""

    def __init__(self) -> None:
        self.card = ScorerCard("moody", -math.inf, 0.0, higher_is_better=False, differentiable=True)

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        if prompts[0] == "break":
            raise ZeroDivisionError("out of luck")
        return torch.full((len(prompts),), math.nan if prompts[0] == "nan" else -1.5)


@contextmanager
def serving(scorer: Scorer, **options) -> Iterator[str]:
    server = ScorerServer(scorer, 0, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10.0)


@contextmanager
def answering(code: int, body: bytes, *, delay: threading.Event | None = None) -> Iterator[str]:
    """A server of something else, which gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if delay is not None and self.path == "/score":
                delay.wait(10.0)
            text = card_to_json(StrokeWeight().card) if self.path == "/card" and code == 200 else body
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        if delay is not None:
            delay.set()
        server.shutdown()
        server.server_close()
        thread.join(10.0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_remote_scores_are_bit_for_bit_the_local_ones(dtype) -> None:
    pixels = PIXELS.to(dtype)
    with serving(Slant(), chunk=2) as address:
        remote = RemoteScorer(address)
        found = score(remote, pixels, PROMPTS)
    assert torch.equal(found, score(Slant(), pixels, PROMPTS))
    assert (remote.card.name, remote.card.low, remote.card.differentiable) == ("slant", -math.inf, False)


def test_clips_travel_and_a_gradient_does_not() -> None:
    clips = torch.rand(2, 3, 4, 6, 6)
    scorer = make_scorer(ScorerChoice("stroke_weight", frames=0.5))
    with serving(scorer) as address:
        remote = make_scorer(ScorerChoice("remote", address))
        assert torch.equal(score(remote, clips, ["a", "b"]), score(scorer, clips, ["a", "b"]))
        with pytest.raises(ValueError, match="not differentiable"):
            score(remote, clips, ["a", "b"], gradient=True)


def test_the_request_round_trips_and_rubbish_is_refused() -> None:
    pixels, prompts = decode_request(encode_request(PIXELS, PROMPTS))
    assert torch.equal(pixels, PIXELS)
    assert prompts == PROMPTS
    for body in (b"", b"pickle", save({"pixels": PIXELS}), save({"pixels": PIXELS, "prompts": torch.ones(3)})):
        with pytest.raises(ValueError, match="are no request"):
            decode_request(body)
    with pytest.raises(ValueError, match="no list of strings"):
        decode_request(save({"pixels": PIXELS, "prompts": torch.tensor(list(b'{"a": 1}'), dtype=torch.uint8)}))


def test_mistakes_travel_back_and_the_server_goes_on() -> None:
    with serving(Moody()) as address:
        remote = RemoteScorer(address)
        assert remote(PIXELS, PROMPTS).tolist() == [-1.5] * 5
        with pytest.raises(
            ValueError, match=r"/score: scorer moody: scores of samples \[0, 1, 2, 3, 4\] are not finite"
        ):
            remote(PIXELS, ["nan", *PROMPTS[1:]])
        with pytest.raises(ValueError, match="4 prompts for 5 samples"):
            remote(PIXELS, PROMPTS[:4])
        with pytest.raises(RuntimeError, match="answered 500: ZeroDivisionError: out of luck"):
            remote(PIXELS, ["break", *PROMPTS[1:]])
        assert remote(PIXELS, PROMPTS).tolist() == [-1.5] * 5


def test_other_paths_and_large_requests_are_refused() -> None:
    with serving(StrokeWeight(), max_bytes=200) as address:
        remote = RemoteScorer(address)
        with pytest.raises(RuntimeError, match=r"answered 413: a request of \d+ bytes; allowed 200"):
            remote(PIXELS, PROMPTS)
        with pytest.raises(RuntimeError, match=r"answered 413: a request of 12\d+ bytes"):
            remote(torch.rand(10, 3, 320, 320), PROMPTS * 2)
        for request in (address + "/", urllib.request.Request(address + "/other", data=b"x")):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(request, timeout=10.0)
            assert error.value.code == 404


def test_the_server_listens_on_loopback_alone_unless_told() -> None:
    server = ScorerServer(StrokeWeight(), 0)
    assert server.server_address[0] == "127.0.0.1"
    server.server_close()
    server = ScorerServer(StrokeWeight(), 0, host="0.0.0.0")
    assert server.server_address[0] == "0.0.0.0"
    server.server_close()


def test_connections_are_tried_again_with_growing_pauses() -> None:
    pauses = []
    with pytest.raises(
        RuntimeError, match=r"no scorer at http://127\.0\.0\.1:\d+/card after 4 attempts .*serve_scorer"
    ):
        RemoteScorer(f"http://127.0.0.1:{free_port()}", patience=Patience(retries=3, backoff=0.25), sleep=pauses.append)
    assert pauses == [0.25, 0.5, 1.0]


def test_a_server_that_comes_late_is_found() -> None:
    port, threads = free_port(), []

    def start(pause: float) -> None:
        if not threads:
            server = ScorerServer(StrokeWeight(), port)
            threads.append(server)
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    remote = RemoteScorer(f"http://127.0.0.1:{port}", sleep=start)
    assert torch.equal(remote(PIXELS, PROMPTS), PIXELS.flatten(1).mean(dim=1))
    threads[0].shutdown()
    threads[0].server_close()


def test_wrong_answers_are_errors() -> None:
    with answering(200, save({"scores": torch.ones(4)})) as address, pytest.raises(RuntimeError, match=r"\(4,\) for 5"):
        RemoteScorer(address)(PIXELS, PROMPTS)
    infinite = save({"scores": torch.tensor([1.0, math.inf, 1.0, 1.0, 1.0])})
    with answering(200, infinite) as address, pytest.raises(RuntimeError, match="1 of them not finite"):
        RemoteScorer(address)(PIXELS, PROMPTS)
    with answering(200, b"no tensors") as address, pytest.raises(RuntimeError, match="10 bytes that are no scores"):
        RemoteScorer(address)(PIXELS, PROMPTS)
    with answering(503, b"later") as address, pytest.raises(RuntimeError, match="answered 503: later"):
        RemoteScorer(address)
    late = threading.Event()
    with answering(200, b"", delay=late) as address:
        remote = RemoteScorer(address, patience=Patience(timeout=0.2))
        with pytest.raises(RuntimeError, match=r"did not answer within 0\.2 s"):
            remote(PIXELS, PROMPTS)


def test_a_card_of_something_else_is_an_error(monkeypatch) -> None:
    with answering(203, b"{}") as address, pytest.raises(RuntimeError, match="no card of a scorer"):
        RemoteScorer(address)


def test_a_proxy_of_the_environment_is_not_used(monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    with serving(StrokeWeight()) as address:
        assert RemoteScorer(address)(PIXELS, PROMPTS).shape == (5,)


@pytest.mark.parametrize("address", ["127.0.0.1:80", "https://127.0.0.1:80", "file:///tmp", "http://a:1/path"])
def test_addresses_that_are_no_server_are_refused(address) -> None:
    with pytest.raises(ValueError, match="write http://host:port"):
        RemoteScorer(address)


def test_patience_is_checked() -> None:
    with pytest.raises(ValueError, match="timeout must be above 0"):
        Patience(timeout=0.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_script_serves_and_says_what_is_missing(repository) -> None:
    script = [sys.executable, repository / "scripts" / "serve_scorer.py"]
    missing = subprocess.run([*script, "--scorer", "hpsv3", "--weights", "nowhere"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert "error: no weights of this Qwen2-VL reward model at nowhere" in missing.stderr
    command = [*script, "--scorer", "stroke_weight", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = line.split()[-1]
        found = score(RemoteScorer(address), PIXELS, PROMPTS)
        process.terminate()
    assert line.startswith("stroke_weight answers at http://127.0.0.1:")
    assert torch.equal(found, score(StrokeWeight(), PIXELS, PROMPTS))


def test_payloads_are_safetensors() -> None:
    assert sorted(load(encode_request(PIXELS, PROMPTS))) == ["pixels", "prompts"]
