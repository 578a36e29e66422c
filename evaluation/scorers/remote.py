"""A scorer in another process, asked over HTTP: for reward models that do not fit beside the training.

Pixels and scores travel as safetensors bytes and prompts as UTF-8 JSON, so nothing is unpickled on either side. There
is no encryption and no password: the server belongs on the loopback interface, or behind a tunnel.
`scripts/serve_scorer.py` starts one; `remote_server.py` is the other side.

Shapes: pixels [B, 3, (F,) H, W] in [0, 1], scores [B].
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fewstep.evaluation.scorers.scorer import ScorerCard

CARD_PATH, SCORE_PATH = "/card", "/score"


@dataclass(frozen=True)
class Patience:
    """How long a client waits: `timeout` seconds for an answer, then, when no connection was made, `retries` further
    attempts after pauses of `backoff`, 2 * `backoff`, 4 * `backoff`, ... seconds.

    Raises ValueError unless timeout is above 0 and the others are not negative.
    """

    timeout: float = 120.0
    retries: int = 5
    backoff: float = 0.5

    def __post_init__(self) -> None:
        if self.timeout <= 0.0 or self.retries < 0 or self.backoff < 0.0:
            raise ValueError(f"{self}; timeout must be above 0, retries and backoff at least 0")


class RemoteScorer:
    """The scorer that a server at `address` ("http://127.0.0.1:8800") holds; not differentiable from here.

    Connections that fail are tried again; an answer that says what is wrong is not. The card is asked for at once, so a
    server that is not there fails before training starts.

    Raises:
        ValueError: the address is not http://host:port, or the server refuses the input.
        RuntimeError: no server answers, it breaks, it takes longer than the timeout, or its answer makes no sense.
    """

    def __init__(
        self, address: str, *, patience: Patience | None = None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        parts = urlparse(address)
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError(f"address is {address!r}; write http://host:port")
        self.address = address.rstrip("/")
        self.patience = patience or Patience()
        self._sleep = sleep
        # A proxy from the environment would carry loopback traffic away.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.card = replace(card_from_json(self._ask(CARD_PATH, None)), differentiable=False)

    def __call__(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] on the device of the pixels."""
        answer = self._ask(SCORE_PATH, encode_request(pixels, prompts))
        try:
            scores = load(answer)["scores"]
        except (SafetensorError, KeyError) as error:
            raise RuntimeError(f"{self.address} answered {len(answer)} bytes that are no scores: {error}") from error
        if tuple(scores.shape) != (len(prompts),) or not bool(torch.isfinite(scores).all()):
            raise RuntimeError(
                f"{self.address} answered scores {tuple(scores.shape)} for {len(prompts)} samples, "
                f"{int((~torch.isfinite(scores)).sum())} of them not finite"
            )
        return scores.to(pixels.device)

    def _ask(self, path: str, body: bytes | None) -> bytes:
        url = self.address + path
        kind = {"Content-Type": "application/octet-stream"}
        last: Exception | None = None
        for attempt in range(self.patience.retries + 1):
            request = urllib.request.Request(url, data=body, headers=kind)
            try:
                with self._opener.open(request, timeout=self.patience.timeout) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                message = error.read().decode("utf-8", errors="replace")
                if error.code == 400:
                    raise ValueError(f"{url}: {message}") from error
                raise RuntimeError(f"{url} answered {error.code}: {message}") from error
            except (OSError, http.client.HTTPException) as error:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                if isinstance(reason, TimeoutError):
                    raise RuntimeError(f"{url} did not answer within {self.patience.timeout} s") from error
                last = error
            if attempt < self.patience.retries:
                self._sleep(self.patience.backoff * 2**attempt)
        tries = self.patience.retries + 1
        raise RuntimeError(
            f"no scorer at {url} after {tries} attempts ({last}); start scripts/serve_scorer.py"
        ) from last


def encode_request(pixels: Tensor, prompts: list[str]) -> bytes:
    """Pixels and prompts as bytes; the dtype of the pixels stays."""
    text = torch.frombuffer(bytearray(json.dumps(prompts).encode()), dtype=torch.uint8)
    return save({"pixels": pixels.detach().cpu().contiguous(), "prompts": text})


def decode_request(body: bytes) -> tuple[Tensor, list[str]]:
    """What `encode_request` packed. Raises ValueError when it is something else."""
    try:
        tensors = load(body)
        prompts = json.loads(bytes(tensors["prompts"].tolist()))
        pixels = tensors["pixels"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{len(body)} bytes are no request: {error}") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts are no list of strings")
    return pixels, prompts


def card_to_json(card: ScorerCard) -> bytes:
    """A card as JSON; infinities are written as Python's json does and read by `card_from_json`."""
    return json.dumps(asdict(card)).encode()


def card_from_json(text: bytes) -> ScorerCard:
    """The card of a server. Raises RuntimeError when it is none, as from a server of something else."""
    try:
        return ScorerCard(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise RuntimeError(f"the answer {text[:80]!r} is no card of a scorer: {error}") from error
