"""Where and with what a case ran."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWN_RESULTS = ("benchmarks/RESULTS.md", "benchmarks/results.json")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name as the system gives it."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def memory_gib() -> float:
    """Memory of the machine, GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def load_average() -> float:
    """Mean number of waiting or running processes in the last minute."""
    return os.getloadavg()[0]


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """Distribution -> installed version, "not installed" where it is not."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit(root: Path = ROOT) -> str:
    """The checkout's commit, " (dirty)" behind it when files differ; the results themselves do not count."""
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    own = [f":(exclude){path}" for path in OWN_RESULTS]
    changed = _git(root, "status", "--porcelain", "--", ".", *own)
    return f"{head[:12]} (dirty)" if changed else head[:12]


def thread_settings() -> dict[str, str]:
    """The environment variables that steer threads and the maths library, those that are set."""
    return {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
