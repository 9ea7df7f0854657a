"""How a command prints an error: one message on stderr, without control characters and without credentials."""

import errno
import sys

from recipes.schema.credentials import without_credentials
from recipes.schema.errors import StratumError
from recipes.schema.foreign import printable, printable_lines

SYSTEM_REMEDIES = {
    errno.EACCES: "Check who may read and write it.",
    errno.EPERM: "Check who may read and write it.",
    errno.EROFS: "The file system cannot be written to. Choose another folder.",
    errno.ENOSPC: "The disk is full. Free some space, then repeat the command.",
    errno.EDQUOT: "Your disk quota is used up. Free some space, then repeat the command.",
    errno.EMFILE: "Raise the limit: `ulimit -n 65536`.",
    errno.ENFILE: "The machine has too many open files. End other processes, then repeat the command.",
    errno.ENOTDIR: "A part of this path is a file, not a folder. Choose another path.",
    errno.EISDIR: "This path is a folder, not a file. Choose another path.",
    errno.EEXIST: "A file or folder of another kind has this path. Choose another path.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "A link in this path leads back to itself. Choose another path.",
    errno.ENOENT: "Check the path.",
}
"""{error of the operating system that the user can fix: remedy}."""


def complain(error: object, *, head: str = "error") -> int:
    """Print an error. -> the exit status of a StratumError; 2 for other errors."""
    sys.stderr.write(f"{head}: {printable_lines(without_credentials(str(error)))}\n")
    sys.stderr.flush()
    return error.status if isinstance(error, StratumError) else 2


def describe_system_error(error: OSError) -> str:
    """An error of the operating system as a message: file, reason, remedy."""
    remedy = SYSTEM_REMEDIES.get(error.errno or 0, "")
    named = f"{printable(str(error.filename))}: " if error.filename is not None else ""
    return f"{named}{error.strerror or error}. {remedy}".rstrip()
