"""Small file systems in memory, for tests of full disks and of folders where nothing may be executed."""

import ctypes
import os
from pathlib import Path

NOEXEC = 8
"""MS_NOEXEC of mount(2)."""
_REC, _PRIVATE = 1 << 14, 1 << 18


def mount_in_memory(folder: Path, *, flags: int = 0, size: str = "4m") -> None:
    """Mount one that only this process and its children see: call it in a forked process. Without root: as root of a user
    namespace of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    os.unshare(os.CLONE_NEWNS | (os.CLONE_NEWUSER if os.geteuid() else 0))
    for source, target, kind, how, options in (
        (None, b"/", None, _REC | _PRIVATE, None),
        (b"tmpfs", bytes(folder), b"tmpfs", flags, f"size={size},mode=700".encode()),
    ):
        if libc.mount(source, target, kind, ctypes.c_ulong(how), options):
            raise OSError(ctypes.get_errno(), f"mount {target!r}: {os.strerror(ctypes.get_errno())}")
