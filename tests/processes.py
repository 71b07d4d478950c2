"""Starts the processes of a test, waits for them with a limit, and leaves none behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run_all(
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], folder: Path, *, timeout: float = 240
) -> list[str]:
    """Runs commands at the same time, each a python command line with additions to the environment.

    Returns:
        What each printed. All have to succeed.
    """
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env={**common, **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that the processes it starts end with it
        )
        for command, extra in commands
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(printed)
    return printed
