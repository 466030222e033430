"""Memory of the process."""

from __future__ import annotations

import ctypes

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees, for its next allocation. True if the C library can do that.

    By default glibc maps every block of some megabytes anew, which costs a page fault per 4 KiB each time. The price:
    memory once used is not returned to the system before the process ends. This affects the whole process and cannot
    be undone, so deepzero never calls it by itself.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
