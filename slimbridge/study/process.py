"""One run in a process of its own, and the line that it fails with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence

MARK = "slimbridge: "
"""What the command line puts before each line of an error."""


def run_process(arguments: Sequence[str], say: Callable[[str], None]) -> str | None:
    """Run slimbridge with these arguments; a process that this one leaves alone is ended.

    Args:
        arguments: of the command line.
        say: gets each line that the process writes.

    Returns:
        None, or why it failed, in one line.
    """
    last: deque[str] = deque(maxlen=20)
    command = [sys.executable, "-m", "slimbridge", *arguments]
    process = subprocess.Popen(
        command,
        env={**os.environ, "SLIMBRIDGE_CHILD": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    with process:
        try:
            for line in process.stdout or ():
                last.append(line.strip())
                say(line.rstrip())
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
    return None if code == 0 else _why(code, last)


def _why(code: int, lines: Sequence[str]) -> str:
    if code < 0:
        return f"was killed by signal {-code}"
    told = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
    if told:
        return "; ".join(told)
    return next((line for line in reversed(lines) if line), f"ended with exit code {code} and no word")
