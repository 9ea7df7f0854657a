"""The command `stratum`: its list of commands, its start, its messages for mistakes; every example of its help runs."""

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  here, so that the processes forked below need not import it
import pytest
import yaml
from pruning_folder import MODEL, lay_out
from ranks import run_ranks
from shards import random_documents, write_folder

from train import run as _assembly  # noqa: F401  likewise
from train import stratum
from train.compress.__main__ import COMMANDS as COMPRESS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*(name.split() for name in stratum.COMMANDS), *(["compress", name] for name in COMPRESS)]
PAGES += [["hf", name] for name in ("export", "import", "check")]


def run(*words: str) -> tuple[int, str]:
    """`stratum WORDS` in this process. -> (exit status, everything it printed)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = stratum.main(list(words))
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue()


def examples(words: list[str]) -> list[str]:
    """The commands in a help text, lines that a backslash continues joined, explanations cut off."""
    text = run(*words, "--help")[1]
    body = re.sub(r"\s*\\\n\s*", " ", text[text.index("\nexamples:\n") :].split("\n\n")[0])
    commands = [re.split(r" {2,}", line.strip())[0] for line in body.splitlines()]
    return [command for command in commands if command.startswith("stratum ")]


def test_every_command_explains_itself_with_usage_and_examples() -> None:
    status, text = run("--help")
    assert status == 0 and all(f"  {name} " in text for name in stratum.COMMANDS)
    for words in PAGES:
        status, text = run(*words, "--help")
        assert status == 0 and text.startswith(f"usage: stratum {' '.join(words)}"), words
        assert "Hydra" not in text and "python -m" not in text.replace("python3 -m launch.doctor", ""), words
        if words[0] != "hf" or len(words) == 1:
            assert examples(words), f"{words}: no examples"


_QUICK = """
import contextlib, io, sys
from train.stratum import main

def check(words, *absent):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try: main(words)
        except SystemExit: pass
    found = set(absent) & set(sys.modules)
    assert not found, f"stratum {' '.join(words)} imported {found}"
    return out.getvalue()
"""


def test_help_and_mistakes_answer_without_torch() -> None:
    """numpy, too, is not needed to explain a command."""
    heavy = ("torch", "megatron", "numpy", "pyarrow", "matplotlib", "transformers")
    pages = [[], ["--version"], ["trian"], *([*words, "--help"] for words in PAGES)]
    program = _QUICK + f"for words in {pages!r}: check(words, *{heavy!r})\n"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_commands_that_need_no_torch_start_without_it_and_without_other_slow_packages(tmp_path: Path) -> None:
    """One process, the command with the fewest imports first."""
    lay_out(tmp_path)
    run_folder = tmp_path / "runs" / "parent"
    run_folder.mkdir(parents=True)
    run_fields = {"name": "parent", "folder": "runs", "steps": 2, "seed": 1, "global_rows": 2}
    recipe = {"run": run_fields, "precision": {}, "model": yaml.safe_load(MODEL)}
    (run_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run_folder / "metrics.jsonl").write_text("")
    write_folder(tmp_path / "prepared", {"python": [random_documents(40, seed=1)]})
    slow = ("torch", "megatron", "transformers", "tensorboard", "wandb", "pyarrow", "fsspec")
    never = (*slow, "matplotlib", "tokenizers", "numpy")
    little = ["-cn", "little", "--config-dir", "recipes"]
    commands = (
        (["status"], (*never, "hydra", "omegaconf"), "step recorded"),
        (["status", "parent"], (*never, "hydra", "omegaconf"), "newest checkpoint"),
        (["logs", "parent"], (*never, "hydra", "omegaconf"), "no logs"),
        (["cancel", "parent"], (*never, "hydra", "omegaconf"), "nothing to cancel"),
        (["checkpoint", "list", "parent"], (*never, "hydra"), "no checkpoints"),
        (["checkpoint", "show", "parent"], (*never, "hydra"), "checkpoint"),
        (["fields", "optim"], never, "optim.lr"),
        (["stages", *little], never, "compress score"),
        (["plan", "-cn", "smoke", "data.folder=none"], never, "GiB"),
        (["launch", "slurm", "-cn", "smoke", "--dry-run"], never, "#SBATCH"),
        (["report", "parent", "--out", "page.html"], (*slow, "matplotlib"), "wrote page.html"),
        (["trace", *little, "--step", "1"], (*slow, "matplotlib"), "row"),
        (["inspect", *little], slow, "python"),
    )
    program = _QUICK + "\n".join(
        f"text = check({words!r}, *{absent!r}); assert {expected!r} in text, text"
        for words, absent, expected in commands
    )
    python = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(python, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_list_of_commands_imports_the_standard_library_only() -> None:
    program = (
        "import sys; before = set(sys.modules); from train.stratum import main; main(['--help']); main(['--version']);"
        "own = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names) - {'train', 'recipes'};"
        "assert not own, own"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"torch {metadata.version('torch')}" in result.stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run `smoke` that has a stored recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "smoke").mkdir(parents=True)
    (tmp_path / "runs" / "smoke" / "recipe.yaml").write_text(
        "run: {name: smoke, folder: runs, steps: 2}\noptim: {lr: 1}\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "there is no command `stratum trian`. Did you mean `stratum train`?"),
        ("launch locl", "there is no command `stratum launch locl`. Did you mean `stratum launch local`?"),
        ("launch", "`stratum launch` needs a command. Use one of: local, slurm, kubernetes, node."),
        ("slurm -cn smoke", "Did you mean `stratum launch slurm`?"),
        ("xyzzy", "There are: prepare, inspect,"),
        ("generate smoke --promt x", "unknown option --promt x. Did you mean --prompt?"),
        ("generate smoke --tokens 0", "--tokens=0 is out of range. Use a value >= 1."),
        ("generate smoke --top-p high", "--top-p='high' is a text, not a number."),
        ("generate smok", "smok is not a run: neither it nor runs/smok has recipe.yaml or logs. Did you mean smoke?"),
        ("generate nemotron_h_tiny", "For the recipe of this name: -cn nemotron_h_tiny."),
        ("generate smoke -cn smoke", "'smoke' names a run, and -cn or --config-dir a recipe. Give only one of them."),
        ("trace smoke step=3", "unknown recipe key 'step' on the command line. Did you mean --step?"),
        ("train smoke optim=adamw", "this recipe does not take its optim from a group"),
        ("plan -cn smoke -m optim.lr=1,2", "-m: this command has no sweeps. Use `stratum train -m`"),
        ("checkpoint lst smoke", "Did you mean list?"),
        ("compress prun", "unknown command. Did you mean prune?"),
        ("fields optm", "there is no group 'optm'. Did you mean optim?"),
        ("status smok", "Did you mean smoke?"),
        ("teacher-cache -cn smok", "there is no recipe 'smok'. Did you mean smoke?"),
    ],
)
def test_a_mistyped_word_gets_a_suggestion(folder: Path, words: str, message: str) -> None:
    status, text = run(*words.split())
    assert status == 2 and message in text, text


def test_a_run_is_named_by_its_folder_or_its_name_and_keeps_its_recipe(folder: Path) -> None:
    """Names may contain characters of Hydra's grammar; overrides win; a moved folder is read at its new place."""
    names = ["smoke", "a b", "x-optim.lr=0.1,y=[1]", "it's", "42", "tail\\", "${HOME}"[1:]]
    for name in names:
        if name != "smoke":
            shutil.copytree(folder / "runs" / "smoke", folder / "runs" / name, dirs_exist_ok=True)
        for given in (name, f"runs/{name}/"):
            status, text = run("train", given, "--cfg", "job", "optim.lr=2")
            found = yaml.safe_load(text.replace("# @package _global_", ""))
            assert status == 0 and found["run"] | {"name": name, "folder": "runs", "steps": 2} == found["run"], (
                name,
                text,
            )
            assert found["optim"]["lr"] == 2
    moved = folder / "else where" / "smoke"
    shutil.copytree(folder / "runs" / "smoke", moved)
    found = yaml.safe_load(run("train", str(moved), "--cfg", "job")[1])
    assert found["run"]["folder"] == str(moved.parent)


def test_a_recipe_with_windows_line_ends_is_the_same_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lay_out(tmp_path)
    words = ("train", "-cn", "little", "--config-dir", "recipes", "--cfg", "job")
    status, text = run(*words)
    for path in (tmp_path / "recipes").rglob("*.yaml"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert status == 0 and run(*words) == (status, text)


def test_no_color_turns_colours_off_and_a_pipe_has_no_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """https://no-color.org: colours are off; bold text may stay."""
    colour, words = (
        re.compile("\x1b\\[[0-9;]*(3|4|9|10)[0-7]"),
        ("plan", "-cn", "smoke", "data.folder=none", "--gpus", "1"),
    )
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert "\x1b" not in run(*words)[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert colour.search(run(*words)[1])
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(run(*words)[1])


def test_a_model_in_hugging_faces_format_names_the_import(folder: Path) -> None:
    (folder / "their model").mkdir()
    (folder / "their model" / "config.json").write_text("{}")
    (folder / "their model" / "model-00001.safetensors").touch()
    place = str(folder / "their model")
    words = f"Import it: stratum hf import {shlex.quote(place)} --out 'imports/their model'. Then: stratum generate (or serve)"
    for command in (
        ["generate", place],
        ["serve", place],
        ["evaluate", place, "--tasks", "needle-1k"],
        ["status", place],
    ):
        status, text = run(*command)
        assert status == 2 and words in text and "evaluate 'imports/their model'/checkpoint" in text, text


def test_every_command_that_is_named_anywhere_exists() -> None:
    """In documents, messages and docstrings: `stratum WORD`, and no `python -m` where there is a command."""
    first = {name.split()[0] for name in stratum.COMMANDS}
    old = re.compile(
        r"python3? -m (?:train\.(?!stratum\b)|data\.|recipes\.|launch (?:local|slurm|plan|status|cancel|doctor))"
    )
    wrong = []
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        if name.endswith((".py", ".md", ".yaml", ".sh", ".toml", "Makefile")) and name != "tests/test_stratum.py":
            text = (ROOT / name).read_text()
            wrong += [f"{name}: {found[0]}" for found in old.finditer(text)]
            for found in re.finditer(r"(?m)(?:`|^[ #$]*|\.venv/bin/)stratum ([a-z][a-z-]*)", text):
                if found[1] not in first | {"help", "command"}:
                    wrong.append(f"{name}: {found[0]}")
    assert not wrong, "\n".join(wrong)


def _example(rank: int, folder: Path, words: list[str]) -> tuple[int, str]:
    os.chdir(folder)
    handle = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):  # the terminal of the command and of the processes it starts
        os.dup2(handle, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if {"--watch", "--follow"} & set(words):  # commands that end with Ctrl-C
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(2)
    try:
        status = stratum.main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    return status, Path("output").read_text()


LITTLE = ["--config-dir", "recipes", "-cn", "little"]
"""Stands for the shipped recipes that would train for minutes."""

IN_TINY = {"runs/tiny_teacher": "runs/parent", "=[8,10]": "=[3,4]", "hamlet.txt": "words.txt", "17": "0",
           "runs/data/smoke": "prepared", "s3://bucket/runs/smoke": "s3://x"}  # fmt: skip
"""Text of an example -> what the folder of `lay_out` has instead."""

MAY_FAIL = {
    "checkpoint diff": "different values",
    "checkpoint list": "is not an address",
    "checkpoint fetch": "is not an address",
    "compress pick": "was not trained yet",
    "doctor --gpu": '"absent"',
    "cancel smoke": "error: ",
    "preferences runs/tiny_sft": "error: ",
    "cancel runs/smoke": "error: ",
    "launch slurm": "ssh could not connect",
}
"""Begin of an example -> what it says where it ends with a status: the checkpoints differ, there is no GPU or Slurm, ..."""


def adapted(line: str) -> list[str]:
    """An example at tiny size: with the little recipe, and as a dry run if it would need a cluster."""
    words = shlex.split(line.split(" | ")[0])[1:]
    is_plan = (
        words[0] == "plan"
        or words[:2] in (["launch", "slurm"], ["launch", "kubernetes"])
        or (words[0] == "stages" and "--run" not in words)
    )
    for shipped, little in IN_TINY.items():
        words = [word.replace(shipped, little) for word in words]
    words = ["prepared" if word == "runs/data/smoke" else word for word in words]
    if "-cn" in words and not is_plan:
        at = words.index("-cn")
        words[at : at + 2] = LITTLE
        if words[0] == "teacher-cache":
            words += ["objective=distill", "objective.teacher=runs/parent"]
        if words[0] == "compress":
            words += ["run.name=hunt", "compress.layers=3", "compress.attention_layers=1"]
        elif words[0] != "stages" and "run.name=" not in line:
            words.append("run.name=smoke")
        words += ["run.microbatch_rows=1"] if "--nproc" in words else []
    if words[0] == "plan" or words[:2] in (
        ["launch", "slurm"],
        ["launch", "kubernetes"],
    ):  # of shipped recipes, not of the run the little one made
        words.append("run.folder=elsewhere")
    if words[:2] in (["launch", "slurm"], ["launch", "kubernetes"]) and "--dry-run" not in words:
        words.append("--dry-run")
    return words


@pytest.mark.slow
def test_every_example_in_every_help_text_runs(tmp_path: Path) -> None:
    """In the order of a run, so that each finds the files of those before."""
    lay_out(tmp_path)
    shutil.copy(ROOT / "launch/plan/published/published_throughput.csv", tmp_path / "rows.csv")
    (tmp_path / "texts").mkdir()
    (tmp_path / "prompts.txt").write_text("one prompt\nanother\n")
    (tmp_path / "texts" / "a.jsonl").write_text("".join(f'{{"body": "words of document {n}"}}\n' for n in range(400)))
    (tmp_path / "stratum.sqsh").touch()
    order = (
        "prepare inspect train trace generate evaluate report status checkpoint merge hf plan launch logs doctor fields"
    )
    order += " validate compress"
    rank_of = {name: rank for rank, name in enumerate(order.split())}
    twice = ["checkpoint.every_steps=1"]  # two checkpoints, for `merge --window`
    for first in (["prepare", *LITTLE], ["train", *LITTLE], ["train", *LITTLE, "run.name=smoke", *twice]):
        assert run_ranks(1, _example, tmp_path, first)[0][0] == 0
    failed = []
    for name in sorted(stratum.COMMANDS, key=lambda name: rank_of.get(name.split()[0], len(rank_of))):
        for line in examples(name.split()):
            words = adapted(line)
            status, text = run_ranks(1, _example, tmp_path, words, timeout_s=300)[0]
            if status and MAY_FAIL.get(" ".join(words[:2]), text + "?") not in text:
                failed.append(f"{line}\n    as {shlex.join(words)}: {status}\n{text[-600:]}")
    assert not failed, "\n".join(failed)
