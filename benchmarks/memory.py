"""Peak extra memory of one call, from the kernel's own high-water mark."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")

HOW = """\
Peak extra memory: the process's resident high-water mark (VmHWM, reset through /proc/self/clear_refs) minus its
resident size at the start, over one run after one unmeasured run, in a process of its own for each competitor; the
larger of two runs, where a run takes no minutes; x weights is its multiple of the memory of the whole model's
parameters and buffers. Memory that an allocator had kept from the unmeasured run is not counted."""


def peak_extra(run: Callable[[Any], Any], prepared: Any) -> int | None:
    """Bytes by which the resident size rose above its start during `run(prepared)`; None where Linux is not there."""
    gc.collect()
    _return_freed_memory()
    try:
        _CLEAR.write_text("5")  # proc(5): resets the peak resident size to the current one
    except OSError:
        return None
    before = _status("VmRSS")
    result = run(prepared)
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS}: no line '{key}'")


def _return_freed_memory() -> None:
    """Give the C heap's free pages back, so that freed memory does not hide what a run needs (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
