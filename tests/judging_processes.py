"""`mmalign annotate` as a process, for tests that kill it or that open it in a browser."""

import itertools
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
PATIENCE_S = 90  # of a machine that does other things
PORTS = itertools.count(12_000 + os.getpid() * 97 % 900 * 20, 20)  # below those that systems hand out by themselves


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str = ""
    told: list[str] = field(default_factory=list)


@contextmanager
def running(*arguments: str, program: str | None = None) -> Iterator[Server]:
    start = [sys.executable, "-m", "mmalign"] if program is None else [sys.executable, "-c", program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*start, "annotate", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    server = Server(process)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            server.told.append(line)
            if found := re.match(r"judging: (http://[^/]+)/", line):
                server.url = found[1]
                break
        assert server.url, "".join(server.told)
        wait(server.url)
        yield server
    finally:
        process.kill()
        server.told += process.stderr.readlines()
        process.stderr.close()
        process.wait()


def wait(url: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            httpx.get(f"{url}/health", timeout=PATIENCE_S).raise_for_status()
            return
        except httpx.TransportError:
            assert time.monotonic() < until
            time.sleep(0.1)


def free_port() -> int:
    """A port for a process that is still to come: nobody is given it meanwhile, here or by the system, nor the 19 after it."""
    for port in PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")
