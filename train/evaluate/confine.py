"""Runs one program written by a model, without the means to harm the machine. `train.evaluate.sandbox` starts it as a script.

    stdin {"program", "check", "token", limits} --limits, Landlock, seccomp--> exec program, exec check --> "token"

The result goes to the descriptor whose number is the script's argument.

The process gives up, in this order: environment and descriptors (the parent passes none), capabilities, resources (memory, CPU
seconds, size of files, open files), the file system (Landlock: the standard library can be read, one folder written), and
system calls (seccomp: no process, no other program, no socket, no signal, no change of rights, mounts or kernel state). A
limit that cannot be set ends the process before the program is read. Linux on x86_64 or aarch64, standard library only.

The program shares this interpreter with its check, so it could find the token in memory: a program can fake a benchmark's score,
but it cannot harm the machine.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
import sysconfig

# (x86_64, aarch64) numbers of refused system calls, from Linux's asm/unistd_64.h and asm-generic/unistd.h; None: no such call.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # processes and other programs (threads: `_filter`)
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # sockets, and io_uring, which could open them
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # other processes
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    # changes of the file system that Landlock does not cover
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "truncate": (76, 45),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    # memory that does not count towards the limits
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "setrlimit": (160, 164), "userfaultfd": (323, 282),
    # the kernel and the machine
    "bpf": (321, 280), "perf_event_open": (298, 241), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162), "syslog": (103, 116),
    "acct": (163, 89), "quotactl": (179, 60), "personality": (135, 92), "iopl": (172, None), "ioperm": (173, None),
}  # fmt: skip
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""By machine: column of the numbers above, and the value of `arch` in a filter's data (linux/audit.h)."""

_READ_FILE, _READ_FOLDER, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
_RIGHTS_OF_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Number of Landlock's file-system rights by ABI version; later versions count like 5."""
_EPERM, _ENOSYS = 1, 38


class Unconfined(Exception):
    """This machine cannot set one of the limits."""


def confine(folder: str, *, memory_bytes: int, cpu_s: int, file_bytes: int) -> None:
    """Give up everything except computing, reading the standard library, and writing in `folder`. It cannot be undone."""
    libc = ctypes.CDLL(None, use_errno=True)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))  # SIGXCPU, then SIGKILL
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 1),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(limit, (value, value))
    # Capabilities, version 3, all sets empty: root then has only the rights of the owner of root's files.
    if libc.capset(struct.pack("II", 0x20080522, 0), bytes(24)):
        raise Unconfined("capabilities cannot be dropped")
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS, without it the next two steps need privileges
        raise Unconfined("PR_SET_NO_NEW_PRIVS is not available")
    _landlock(libc, folder)
    _seccomp(libc)


def _landlock(libc: ctypes.CDLL, folder: str) -> None:
    abi = libc.syscall(444, None, 0, 1)
    if abi < 1:
        raise Unconfined("Landlock is not available (Linux 5.13 or later, enabled at boot)")
    rights = (1 << _RIGHTS_OF_ABI[min(abi, 5)]) - 1
    handled = [rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0]  # file system; TCP; signals and abstract sockets
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    rules = libc.syscall(444, struct.pack("QQQ", *handled), size, 0)
    if rules < 0:
        raise Unconfined("Landlock refuses a ruleset")
    readable = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.join(sys.base_prefix, "lib")}
    readable |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    allowed = {path: _READ_FILE | _READ_FOLDER for path in readable}
    allowed |= {"/dev/urandom": _READ_FILE, "/dev/null": _READ_FILE | _WRITE_FILE, folder: rights}
    for path, access in allowed.items():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # does not exist on this system
        if libc.syscall(445, rules, 1, struct.pack("=Qi", access, place), 0):
            raise Unconfined(f"Landlock refuses a rule for {path}")
        os.close(place)
    if libc.syscall(446, rules, 0):
        raise Unconfined("Landlock cannot be entered")
    os.close(rules)


def _seccomp(libc: ctypes.CDLL) -> None:
    code = _filter(platform.machine())
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
    if libc.prctl(22, 2, program, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise Unconfined("seccomp filters are not available")


def _filter(machine: str) -> bytes:
    """The seccomp program: classic BPF over {int nr; u32 arch; u64 ip; u64 args[6]}, little-endian."""
    if machine not in _ARCHITECTURES:
        raise Unconfined(f"there is no list of system calls for {machine}")
    column, arch = _ARCHITECTURES[machine]
    load, equal, at_least, has_bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, refuse, unknown, allow = 0x80000000, 0x00050000 | _EPERM, 0x00050000 | _ENOSYS, 0x7FFF0000
    number = (load, 0, 0, 0)
    code = [(load, 0, 0, 4), (equal, 1, 0, arch), (answer, 0, 0, kill), number]
    if machine == "x86_64":  # the x32 variants of all calls
        code += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, kill)]
    # A thread is a clone with CLONE_THREAD. clone3 hides its flags in memory; libc then falls back to clone.
    code += [(equal, 0, 4, _CLONE[column]), (load, 0, 0, 16), (has_bits, 0, 1, 0x10000), (answer, 0, 0, allow),
             (answer, 0, 0, refuse)]  # fmt: skip
    code += [(equal, 0, 1, _CLONE3[column]), (answer, 0, 0, unknown)]
    # prlimit is allowed if it only reads: its third argument, the new limit, is null.
    code += [(equal, 0, 6, _PRLIMIT[column]), (load, 0, 0, 32), (equal, 0, 3, 0), (load, 0, 0, 36), (equal, 0, 1, 0),
             (answer, 0, 0, allow), (answer, 0, 0, refuse)]  # fmt: skip
    for numbers in REFUSED.values():
        if (found := numbers[column]) is not None:
            code += [(equal, 0, 1, found), (answer, 0, 0, refuse)]
    code.append((answer, 0, 0, allow))
    return b"".join(struct.pack("<HBBI", *step) for step in code)


def main() -> None:
    """Read the job from stdin, run it confined, write the result."""
    result = int(sys.argv[1])
    job = json.loads(sys.stdin.buffer.read())
    token = job["token"].encode()
    try:
        os.chdir(job["folder"])
        confine(job["folder"], **job["limits"])
    except (Unconfined, OSError, ValueError) as error:
        os.write(result, b"unconfined: " + str(error).encode())
        os._exit(1)
    names: dict[str, object] = {"__name__": "candidate"}
    try:
        exec(compile(job["program"], "candidate.py", "exec"), names)
        exec(compile(job["check"], "check.py", "exec"), names)
        answer = token
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}".encode(errors="replace")[:500]
    os.write(result, answer)
    os._exit(0)  # ends the program's threads and skips its exit handlers


if __name__ == "__main__":
    main()
