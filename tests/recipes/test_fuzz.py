"""Random command lines and recipe files: one message and an exit status, no traceback, no hang, nothing written or run unasked.

Each case runs in this process through the entry point of `stratum`, and ends before anything is trained or prepared. All cases
run in a forked child, in which an audit hook sees every file, process and connection that Python opens.
"""

import contextlib
import io
import json
import os
import re
import signal
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from ranks import run_ranks

import data.prepare
import train.run
from recipes.schema.command import dotted_keys
from recipes.schema.recipe import Recipe
from train import stratum
from train.build import check_start

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
HEAD = "# @package _global_\n"
SMOKE = f"{HEAD}defaults: [smoke, _self_]\n"
MOST_SECONDS = 10.0
"""Of CPU time; of the clock six times as many, because the machine may be busy."""
GROUPS = sorted({path.parent.name for path in RECIPES.glob("*/*.yaml")})
OPTIONS = sorted(f"{path.parent.name}={path.stem}" for path in RECIPES.glob("*/*.yaml"))
"""Every `group=option` there is."""
STARTS_PROCESSES = {"launch local", "launch slurm", "stages", "doctor", "status", "cancel"}
ENDLESS = {"--follow", "--watch"}

FIELDS = st.sampled_from(dotted_keys(Recipe))
KEYS = FIELDS | st.sampled_from(
    ["hydra", "hydra.callbacks.x", "hydra.run.dir", "hydra/launcher", "_target_", "model._target_", "stages", "compress",
     "compress.layers", "data.sources.a.path", "data.sources.shakespeare.wieght", "nope",
     "run.stpes", "", ".", "a/b@c.d", *GROUPS]
)  # fmt: skip
TEXTS = st.text(max_size=12) | st.sampled_from(
    ["null", "", " ", ".inf", "-.inf", ".nan", "nan", "-1", "0", "1e-40", "1e400", str(2**63), str(-(2**63)), "9" * 5000, "true",
     "[", "{a: b", "[[1]]", "[[[[1]]]]", "{}", "[]", "[a,[b,{c: d}]]", "{_target_: x}", "{a: {_target_: os.system}}",
     "${run.folder}", "${oc.env:HOME}", "${", "${run.name}", "${.}", "${data}", "..", "/", "a/../..", "/dev/zero", "x" * 5000,
     "/".join("y" * 200 for _ in range(30)), "1,2", "a,b,c", "range(1,5)", "glob(*)", "interval(0,1)", "choice(a,b)",
     "shuffle(1,2)", "sort(b,a)", "tag(x,1)", "int(x)", "\x1b[2J", "a\nb", "a\tb", "\x00", "\ud800", "\u202e", "\U0001f600", "'",
     '"', "\\", "\\'", "~", "#", "a#b", "a=b", "!!python/name:os.system", "&a [*a]", "---", "%TAG", "https://me:pw@host/x?token=y",
     "s3://", "hf://x", "file:///etc/passwd", "{a,b}" * 30, "(" * 300, "$(touch x)", "`touch x`", "; touch x", "???"]
)  # fmt: skip
"""Values of wrong types, out of range, very long, and what YAML, Hydra's grammar, OmegaConf or a shell would act on."""
OVERRIDES = st.sampled_from(OPTIONS) | st.builds(
    lambda sign, key, equals, text: f"{sign}{key}{equals}{text}",
    st.sampled_from(["", "", "", "+", "++", "~", "--", "-"]), KEYS, st.sampled_from(["=", "=", "=", "", "@x="]), TEXTS,
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\n"
LINES_OF_YAML = st.lists(
    st.sampled_from(
        ["run: {steps: 1}", "run: {steps: 2}", "run:\n\tname: x", "run: &r {name: a}\nmodel: *r", "<<: {a: 1}", "? [a]\n: b",
         "!!python/object/apply:os.system ['touch x']", "--- 1\n--- 2", "defaults: [smoke]", "defaults: {a: b}", "defaults: [n]",
         "defaults: [/../x]", "defaults: [optional nope, {override optim: nope}]", "hydra: {run: {dir: x}}", "data: {sources: ~}",
         "data: {sources: {a: null, 1: {path: 2}}}", "stages: [1]", "stages: {a: 'rm -rf x'}", "run: !!float x", "2024-01-01: 1",
         "optim: {lr: 1_000, betas: [.9]}", "x" * 3000, "a: " + "[" * 99, BOMB]
    ) | st.text(max_size=40),
    min_size=1, max_size=3,
).map("\n".join)  # fmt: skip


class Hang(BaseException):
    """A case took longer than MOST_SECONDS."""


class Started(BaseException):
    """A case reached what a test must not do: train, prepare, start a process. Not an Exception, so that nothing catches it."""


class Watch:
    """An audit hook that refuses processes, connections, and files outside of a folder, and remembers the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_on = False
        self.outside: list[str] = []
        self.changing = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2,
                         "os.truncate": 1, "os.chmod": 1, "os.utime": 1}  # fmt: skip
        """Event -> how many of its arguments are paths that change."""

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        if event in (
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
            "os.forkpty",
            "subprocess.Popen",
            "pty.spawn",
        ):
            raise Started(f"{event}{arguments}")
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            raise OSError(101, "Network is unreachable")
        if event == "open":
            path, mode, flags = arguments
            writes = (
                flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                if flags
                else mode and set(mode) & set("wax+")
            )
            if writes:
                self._check(path)
        for path in arguments[: self.changing.get(event, 0)]:
            self._check(path)

    def _check(self, path: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        where = os.path.abspath(os.fsdecode(path))
        if where != "/dev/null" and not where.startswith(f"{self.folder}/"):
            self.outside.append(where)
            raise PermissionError(13, "Permission denied", where)


class Fuzz:
    """Runs cases in a folder that is the working folder, the home and the place of temporary files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        os.chdir(self.folder)
        os.environ |= {name: str(self.folder) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR")} | {
            "PATH": ""
        }
        sys.dont_write_bytecode = True
        for name, text in {
            "good": "run: {name: good, folder: runs, steps: 2}\n",
            "bomb": BOMB * 2,
            "bad": "\xff: [",
            "empty": "",
        }.items():
            (self.folder / "runs" / name / "checkpoints").mkdir(parents=True)
            (self.folder / "runs" / name / "recipe.yaml").write_text(text, encoding="latin-1")
        (self.folder / "runs" / "bad" / "metrics.jsonl").write_bytes(b"\xff\n{\n\x1b[2J")
        os.mkfifo(self.folder / "runs" / "bad" / "checkpoints" / "latest")
        self.watch = Watch(self.folder)
        sys.addaudithook(self.watch)
        signal.signal(signal.SIGALRM, self._hang)
        signal.signal(signal.SIGPROF, self._hang)
        train.run.train = self._train  # the last act of `stratum train` that costs nothing is to check the recipe
        data.prepare.prepare = self._prepare

    def case(self, words: list[str]) -> None:
        """`stratum WORDS` ends with SystemExit or an exit status, and one message without control characters."""
        out, err = io.StringIO(), io.StringIO()
        command = (
            next((name for name in (" ".join(words[:2]), words[0]) if name in stratum.COMMANDS), "") if words else ""
        )
        self.watch.outside.clear()
        status: Any = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), self._limits():
            try:
                status = stratum.main(words)
            except SystemExit as end:
                status = end.code
            except Started as started:
                assert str(started) == command or command in STARTS_PROCESSES, f"{words}: {started}"
        shown = out.getvalue() + err.getvalue()
        asked = [
            where
            for where in self.watch.outside
            if not any(part and part in where for w in words for part in w.split("="))
        ]
        assert not asked, f"{words} writes {asked}"
        assert status in (0, 1, 2), f"{words}: status {status}"
        assert status != 2 or not words or err.getvalue().startswith(("error: ", "usage: stratum")), (
            f"{words}: {err.getvalue()!r}"
        )
        assert "Traceback" not in shown, f"{words}: {shown}"
        assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in shown), f"{words}: {shown!r}"

    def file(self, text: str) -> None:
        """`stratum plan` of a recipe with this text."""
        (self.folder / "mine").mkdir(exist_ok=True)
        (self.folder / "mine" / "mine.yaml").write_bytes(text.encode("utf-8", errors="surrogatepass"))
        self.case(["plan", "--config-dir", "mine", "-cn", "mine"])

    @contextlib.contextmanager
    def _limits(self) -> Iterator[None]:
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 6 * MOST_SECONDS)
        self.watch.is_on = True
        try:
            yield
        finally:
            self.watch.is_on = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _hang(self, number: int, frame: Any) -> None:
        raise Hang(f"longer than {MOST_SECONDS:g} s")

    def _train(self, recipe: Recipe) -> Any:
        check_start(recipe, world=1)
        raise Started("train")

    def _prepare(self, config: Any, **_: Any) -> None:
        raise Started("prepare")


def as_file(base: str, key: str, value: Any) -> str:
    """A recipe that gives one field a value; JSON is YAML."""
    first, *rest = key.split(".")
    for name in reversed(rest):
        value = {name: value}
    return f"{base}{json.dumps({first: value})[1:-1]}\n"


def command_lines() -> SearchStrategy[list[str]]:
    """Any command, with a run, a recipe or neither, its options with any value, overrides and loose words."""
    groups = [*(name.split() for name in stratum.COMMANDS), *([g, c] for g, cs in SUBCOMMANDS.items() for c in cs)]

    def of_command(name: list[str]) -> SearchStrategy[list[str]]:
        options = [option for option in options_of(name) if option not in ENDLESS] or ["--help"]
        option = st.builds(
            lambda o, t, e: [f"{o}={t}"] if e else [o, t], st.sampled_from(options), TEXTS, st.booleans()
        )
        named = st.sampled_from(
            [["-cn", "smoke"], ["-cn", "smoke"], ["-cn", "smok"], ["-cn", ""], ["-cn", "../x"], ["good"], ["runs/good"], ["bad"],
             ["bomb"], ["empty"], ["good", "bad"], [], ["--config-dir", "nowhere", "-cn", "x"], ["-cn"], ["smoke"], ["runs"]]
        )  # fmt: skip
        extra = st.sampled_from(
            [
                [],
                [],
                [],
                ["-m"],
                ["--cfg", "job"],
                ["--cfg", "all"],
                ["--resolve", "--cfg"],
                ["-p", "x"],
                ["--"],
                ["-h"],
            ]
        )
        more = st.lists(OVERRIDES.map(lambda word: [word]) | option | TEXTS.map(lambda text: [text]), max_size=2)
        return st.builds(lambda n, x, m: [*name, *n, *x, *(w for words in m for w in words)], named, extra, more)

    return st.sampled_from(groups).flatmap(of_command) | st.lists(TEXTS, max_size=3)


SUBCOMMANDS = {
    "checkpoint": ["list", "show", "verify", "diff", "reshard", "consolidate"],
    "hf": ["export", "import", "check"],
    "compress": ["score", "prune", "search", "pick"],
}


def options_of(name: list[str]) -> list[str]:
    """The options that the help of a command names."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        stratum.main([*name, "--help"])
    return sorted(set(re.findall(r"(?m)^ +(?:-\w, )?(--[a-z][a-z-]+)", out.getvalue())))


ANY: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "database": None,
    "phases": [Phase.explicit, Phase.generate, Phase.shrink],
}
WORDS = st.lists(OVERRIDES, min_size=1, max_size=3).map(lambda words: ["plan", "-cn", "smoke", *words])
FILES = st.builds(as_file, st.sampled_from([SMOKE, HEAD, HEAD]), KEYS, VALUES) | st.builds(
    lambda head, text: head + text, st.sampled_from([SMOKE, HEAD]), LINES_OF_YAML
)


def fuzz(rank: int, folder: Path, surface: str, count: int) -> None:
    """So many cases of a surface, in this process."""
    here = Fuzz(folder)
    cases, run = {"words": (WORDS, here.case), "files": (FILES, here.file), "commands": (command_lines(), here.case)}[
        surface
    ]

    def one(case: Any) -> None:
        run(case)

    for words in (
        ["plan", "-cn", "smoke", "data=[[]]"],
        ["plan", "-cn", "smoke", "~model=1e400"],
        ["plan", "-cn", "smoke", "run.steps=1" * 3000],
        ["train", "-cn", "smoke", f"run.name={'[' * 400}"],
    ):
        one = example(words)(one) if surface == "words" else one
    settings(max_examples=count, **ANY)(given(cases)(one))()


@pytest.mark.parametrize(("surface", "count"), [("words", 20), ("files", 25), ("commands", 80)])
def test_random_input_gives_one_message(surface: str, count: int, tmp_path: Path) -> None:
    run_ranks(1, fuzz, tmp_path, surface, count)


@pytest.mark.slow
@pytest.mark.parametrize("surface", ["words", "files", "commands"])
def test_much_random_input_gives_one_message(surface: str, tmp_path: Path) -> None:
    run_ranks(1, fuzz, tmp_path, surface, 2000, timeout_s=1800)
