"""Code written by a model: right programs pass, wrong ones fail, hostile ones end without harm."""

import os
import re
import socket
import time
from pathlib import Path

import pytest

from train.evaluate import confine
from train.evaluate.sandbox import Limits, run

ADD = "def add(a, b):\n    return a + b\n"


def test_right_wrong_and_broken_programs() -> None:
    assert run(ADD, "assert add(2, 3) == 5").passed
    assert run(ADD, "assert add(2, 3) == 6").why.startswith("AssertionError")
    assert "SyntaxError" in run("def add(a, b)\n", "assert True").why
    assert run("import math, re, json, collections, itertools, random, typing, heapq, datetime\n", "pass").passed
    text = "open('mine.txt', 'w').write('x')\nassert open('mine.txt').read() == 'x'"
    assert run(text, "import os; assert os.getcwd().startswith('/tmp') and not os.environ.get('HOME')").passed


HOSTILE = {
    "fork bomb": "for _ in range(1000): os.fork()",
    "other program": "subprocess.run(['/bin/sh', '-c', 'touch {outside}/made'], check=True)",
    "exec": "os.execv('/bin/touch', ['touch', '{outside}/made'])",
    "network": "socket.create_connection(('127.0.0.1', {port}), timeout=2)",
    "datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "raw socket call": "assert ctypes.CDLL(None).syscall(41, 2, 1, 0) >= 0",
    "file written outside": "open('{outside}/made', 'w').write('x')",
    "file changed": "open('{outside}/secret', 'a').write('x')",
    "file read": "open('{outside}/secret').read()",
    "file cut": "os.truncate('{outside}/secret', 0)",
    "file deleted": "os.remove('{outside}/secret')",
    "file renamed": "os.rename('{outside}/secret', 'here')",
    "rights changed": "os.chmod('{outside}/secret', 0)",
    "times changed": "os.utime('{outside}/secret', (0, 0))",
    "folder listed": "os.listdir('{outside}')",
    "link out": "os.symlink('{outside}/secret', 'here'); open('here').read()",
    "hard link out": "os.link('{outside}/secret', 'here')",
    "other processes": "os.kill({pid}, signal.SIGTERM)",
    "memory of others": "open('/proc/{pid}/mem', 'rb').read(1)",
    "limits raised": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "other user": "os.setuid(1)",
    "other root": "os.chroot('.')",
    "namespaces": "os.unshare(os.CLONE_NEWUSER)",
    "huge memory": "bytearray(8 << 30)",
    "memory outside": "os.memfd_create('x')",
    "large file": "open('large', 'wb').write(bytes(1 << 24))",
    "environment": "os.environ['SECRET']",
}
"""Statements that must fail where they are tried."""


def test_hostile_statements_fail_and_touch_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    (tmp_path / "secret").write_text("top")
    before = (tmp_path / "secret").stat()
    program = "import ctypes, os, resource, signal, socket, subprocess\nworked = []\n"
    for name, statement in HOSTILE.items():
        tried = f"try:\n    {statement}\n    worked.append({name!r})\nexcept Exception: pass\n"
        program += tried
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.0)
        for key, value in {"outside": tmp_path, "port": server.getsockname()[1], "pid": os.getpid()}.items():
            program = program.replace("{" + key + "}", str(value))
        outcome = run(program, "assert not worked, worked", limits=Limits(memory_bytes=1 << 28))
        assert outcome.passed, outcome.why
        with pytest.raises(BlockingIOError):
            server.accept()
    after = (tmp_path / "secret").stat()
    assert [path.name for path in tmp_path.iterdir()] == ["secret"] and (tmp_path / "secret").read_text() == "top"
    assert (after.st_mode, after.st_nlink, after.st_mtime_ns) == (before.st_mode, before.st_nlink, before.st_mtime_ns)


def test_programs_that_end_or_fill_the_memory_do_not_pass() -> None:
    assert run("import os\nos._exit(0)", "assert False").why == "ended early"
    assert run("raise SystemExit(0)", "assert False").why.startswith("SystemExit")
    filled = run("x = []\nwhile True: x.append(bytearray(1 << 20))", "pass", limits=Limits(memory_bytes=1 << 28))
    assert filled.why.startswith("MemoryError")


def test_endless_programs_are_ended() -> None:
    """One that computes, one that sleeps, one that fills its folder with many small files, one that fills the pipe."""
    began = time.monotonic()
    assert run("while True: pass", "pass", limits=Limits(cpu_s=1), timeout_s=20).why == "timed out"
    assert run("import time\ntime.sleep(60)", "pass", timeout_s=0.5).why == "timed out"
    many = "for i in range(10**9):\n    open(str(i), 'wb').write(bytes(4000))"
    assert run(many, "pass", limits=Limits(file_bytes=1 << 12, cpu_s=5), timeout_s=20).why == "wrote too much"
    assert not run("import os, sys\nwhile True: os.write(int(sys.argv[1]), b'x' * 4096)", "pass", timeout_s=0.5).passed
    assert time.monotonic() - began < 60


def test_threads_run_and_their_end_is_not_waited_for() -> None:
    program = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"
    assert run(program, "pass", timeout_s=20).passed


@pytest.mark.parametrize(
    ("column", "header", "prefix"),
    [
        (0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "__NR_"),
        (1, "/usr/include/asm-generic/unistd.h", "__NR3?2?6?4?_"),
    ],
)
def test_numbers_of_system_calls_are_the_kernels(column: int, header: str, prefix: str) -> None:
    """Where the machine has the kernel's headers; numbers are compared by name."""
    text = Path(header).read_text() if Path(header).exists() else ""
    known = {name: int(number) for name, number in re.findall(rf"#define {prefix}(\w+) (\d+)\b", text)}
    for name, numbers in confine.REFUSED.items():
        if name in known:
            assert numbers[column] == known[name], name
