"""Scripts as processes of their own, without paying for the imports each time.

This file is also a program: it imports what a run needs and then forks one process for each request. The child runs
a script (scripts/train_dmd.py if no other is named) as `python SCRIPT ...` would, and can be killed at any moment.
"""

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "train_dmd.py"
PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class Run:
    """A started run: its process and the file that its output goes to."""

    server: "RunServer"
    pid: int
    log: Path

    def wait(self) -> int:
        """Wait for the end; the exit code, or minus the signal that killed it."""
        return self.server.ask({"wait": self.pid})["code"]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it need not, if the run ends before."""
        started = asked = time.monotonic()
        while not condition():
            time.sleep(0.002)
            if time.monotonic() - asked < 0.2:
                continue
            asked = time.monotonic()
            assert asked - started < PATIENCE_SECONDS, self.log.read_text(encoding="utf-8")[-3000:]
            if self.server.ask({"ended": self.pid})["ended"]:
                return

    def signal(self, number: int) -> None:
        """Send a signal, if the run has not ended."""
        self.server.ask({"signal": number, "pid": self.pid})


class RunServer:
    """The client's side: starts this file as a program and sends it requests."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).resolve())]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *arguments: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        script: Path = SCRIPT,
        folder: Path | None = None,
    ) -> Run:
        """Start a script with these arguments, in a working directory."""
        request = {
            "arguments": arguments,
            "log": str(log),
            "environment": dict(environment or {}),
            "script": str(script),
            "folder": None if folder is None else str(folder),
        }
        return Run(self, self.ask(request)["pid"], log)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()
        self.process.stdout.close()


def answer(value: Mapping[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def serve() -> dict[str, Any] | None:
    """Answer requests until there are no more; in a new child, return the request that it was made for."""
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        pid = request.get("wait") or request.get("ended") or request.get("pid")
        if pid is None:
            child = os.fork()
            if child == 0:
                return request
            answer({"pid": child})
            continue
        # The child stays a zombie until it is waited for here, so its number cannot belong to anybody else.
        if pid not in codes:
            ended, status = os.waitpid(pid, 0 if "wait" in request else os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if "signal" in request and pid not in codes:
            os.kill(pid, request["signal"])
        answer({"code": codes.get(pid), "ended": pid in codes})
    return None


def main() -> None:
    import fewstep.dmd.train  # noqa: F401 - the imports that every run shares

    request = serve()
    if request is None:
        return
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(request["environment"])
    if request["folder"] is not None:
        os.chdir(request["folder"])
    sys.argv = [request["script"], *request["arguments"]]
    # As the interpreter would have it for a script.
    sys.path[0] = str(Path(request["script"]).parent)
    runpy.run_path(request["script"], run_name="__main__")


if __name__ == "__main__":
    main()
