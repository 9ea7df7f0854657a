"""Recipes from strangers: none runs code, reads the environment or other files, hangs, or ends in a traceback."""

import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.schema.command import dotted_keys, run_command
from recipes.schema.foreign import literal, parse_yaml, printable, read_bounded
from recipes.schema.launch_rules import environment_problems
from recipes.schema.read import read_recipe, recipe_mapping, recipe_yaml
from recipes.schema.recipe import Recipe
from recipes.schema.run_folder import recipe_in
from train import stratum

HEAD = "# @package _global_\n"
SMOKE = "defaults: [smoke, _self_]\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def say(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, list[Recipe]]:
    found: list[Recipe] = []

    def job(composed: Any) -> int:
        found.append(read_recipe(composed))
        return 0

    status = run_command(job, words, program="plan", keys=dotted_keys(Recipe), user_errors=())
    return status, capsys.readouterr().err, found


HOSTILE = {
    "callback": (f"{HEAD}{SMOKE}hydra:\n  callbacks:\n    x: {{_target_: numpy.load, file: evil}}\n", "hydra"),
    "logging": (f"{HEAD}{SMOKE}hydra:\n  job_logging: {{handlers: {{f: {{filename: /tmp/x}}}}}}\n", "hydra"),
    "dotted": (f"{HEAD}{SMOKE}hydra.callbacks.x: {{file: evil}}\n", "hydra.callbacks.x"),
    "target": (f"{HEAD}{SMOKE}model:\n  _target_: os.system\n", "model._target_"),
    "target in a list": (f"{HEAD}{SMOKE}data:\n  phases: [{{_target_: os.system}}]\n", "data.phases[0]._target_"),
    "package": (f"# @package hydra.callbacks\n{SMOKE}x: {{file: evil}}\n", "@package"),
    "global package": (f"# @package _global_.hydra\n{SMOKE}x: 1\n", "@package"),
    "defaults": (f"{HEAD}defaults: [smoke, {{override hydra/launcher: joblib}}, _self_]\n", "defaults"),
    "defaults package": (f"{HEAD}defaults: [smoke, {{optim@hydra.callbacks: standard}}, _self_]\n", "defaults"),
    "searchpath": (f"{HEAD}{SMOKE}hydra:\n  searchpath: [pkg://evil]\n", "hydra"),
    "environment": (f"{HEAD}{SMOKE}run:\n  name: ${{oc.env:HOME}}\n", "run.name"),
    "environment in defaults": (f"{HEAD}defaults: [smoke, {{optim: '${{oc.env:HOME}}'}}, _self_]\n", "defaults[1].optim"),
    "nested": (f"{HEAD}{SMOKE}run:\n  name: ${{${{run.folder}}}}\n", "run.name"),
    "decode": (f"{HEAD}{SMOKE}run:\n  name: ${{oc.decode:x}}\n", "run.name"),
    "hydra resolver": (f"{HEAD}{SMOKE}run:\n  name: ${{hydra:runtime.cwd}}\n", "run.name"),
    "hydra reference": (f"{HEAD}{SMOKE}run:\n  name: ${{hydra.runtime.cwd}}\n", "run.name"),
    "key": (f"{HEAD}{SMOKE}run:\n  ${{oc.env:HOME}}: 1\n", "is computed"),
    "other folder": (f"{HEAD}defaults: [/../../evil, _self_]\n", "Could not load"),
    "tag": (f"{HEAD}{SMOKE}run: !!python/object/apply:os.system ['true']\n", "not YAML"),
    "bomb": (f"{HEAD}{SMOKE}{BOMB}", "aliases stand for"),
    "own alias": (f"{HEAD}{SMOKE}run: &a [*a]\n", "contains itself"),
    "deep": (f"{HEAD}{SMOKE}run: {'[' * 5000}\n", "levels deep"),
    "tab": (f"{HEAD}run:\n\tname: x\n", "tabs"),
    "syntax": (f"{HEAD}run: [1, 2\nx: }}\n", "line"),
    "twice": (f"{HEAD}run:\n  name: a\n  name: b\n", "written twice"),
    "list": ("- 1\n- 2\n", "not a group of fields"),
    "latin-1": ("run: {name: \xe9}\n", "not UTF-8"),
    "cycle": (f"{HEAD}{SMOKE}run:\n  name: ${{run.folder}}\n  folder: ${{run.name}}\n", "does not resolve"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_strangers_recipe_is_refused_with_the_key(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, named = HOSTILE[kind]
    (tmp_path / "evil.yaml").write_text(text, encoding="latin-1")
    status, said, found = say(capsys, "--config-dir", str(tmp_path), "-cn", "evil")
    assert (status, found) == (2, []), said
    assert said.startswith("error: ") and named in said, said
    assert not re.search(r"\.\.(\s|$)", said), "a sentence ends with one full stop"


@pytest.mark.parametrize(
    "word",
    [
        "hydra.callbacks.x={_target_: os.system}",
        "+hydra.callbacks.x._target_=os.system",
        "hydra/launcher=joblib",
        "hydra.run.dir=/tmp/x",
        "+optim@hydra.callbacks=standard",
        "+model._target_=os.system",
        "+data.sources={a: {_target_: os.system}}",
        "run.name=${oc.env:HOME}",
        "run.name='${oc.env:HOME}'",
        "optim.lr=${oc.decode:1}",
        "hydra.searchpath=[pkg://evil]",
        "+hydra.searchpath=[file://evil]",
        "hydra.searchpath=[{_target_: os.system}]",
    ],
)
def test_a_word_that_runs_code_or_reads_the_environment_is_refused(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said, found = say(capsys, "-cn", "smoke", word)
    assert (status, found) == (2, []), said


def test_references_to_fields_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(f"{HEAD}{SMOKE}run: {{start_from: '${{run.folder}}/x'}}\n")
    status, said, found = say(capsys, "--config-dir", str(tmp_path), "-cn", "mine", "run.name=a-${run.seed}")
    assert status == 0, said
    assert (found[0].run.start_from, found[0].run.name) == ("runs/x", "a-1234")


def test_a_payload_does_not_run_at_plan(tmp_path: Path) -> None:
    program = f"import pathlib; pathlib.Path({str(tmp_path / 'payload_ran')!r}).touch()"
    (tmp_path / "evil.yaml").write_text(
        f"{HEAD}{SMOKE}hydra:\n  callbacks:\n    x: {{_target_: builtins.exec, _args_: [{program!r}]}}\n"
    )
    words = ["-m", "train.stratum", "plan", "--config-dir", str(tmp_path), "-cn", "evil"]
    end = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=120)
    assert end.returncode == 2 and end.stderr.startswith("error: ") and "Traceback" not in end.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["evil.yaml"]


def test_a_pipe_as_a_recipe_does_not_hang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "evil.yaml")
    status, said, _ = say(capsys, "--config-dir", str(tmp_path), "-cn", "evil")
    assert status == 2 and "evil" in said
    with pytest.raises(OSError, match="a pipe"):
        read_bounded(tmp_path / "evil.yaml")
    with pytest.raises(OSError, match="a device"):
        read_bounded(Path("/dev/zero"))
    (tmp_path / "long").write_bytes(b"x" * 11)
    with pytest.raises(OSError, match="longer than 10 bytes"):
        read_bounded(tmp_path / "long", most_bytes=10)


def test_a_sweep_with_long_words_has_short_names(capsys: pytest.CaptureFixture[str]) -> None:
    status, said, found = say(capsys, "-cn", "smoke", "-m", "optim.lr=1e-3,3e-4", f"run.start_from={'y' * 200}")
    assert status == 0, said
    names = [recipe.run.name for recipe in found]
    assert len(set(names)) == 2 and all(len(name.encode()) <= 200 for name in names)
    assert [recipe.optim.lr for recipe in found] == [1e-3, 3e-4]
    status, said, found = say(capsys, "-cn", "smoke", "-m", "run.seed=range(0,1000000000)")
    assert status == 2 and "more than 1,000 runs" in said and not found


def test_escape_codes_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = say(capsys, "-cn", "smoke", "run.device=\x1b[2J\x1b]0;owned\x07")
    assert status == 2 and "\x1b" not in said and "\x07" not in said
    assert printable("a\x1b[31m\u202eb\n") == "a\\x1b[31m\\u202eb\\n"
    assert parse_yaml("a: {b: [1, x]}") == {"a": {"b": [1, "x"]}}


def test_secrets_are_refused_or_left_out_of_what_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("HF_TOKEN=x", "WANDB_API_KEY=x", "AWS_SECRET_ACCESS_KEY=x", "PROXY=https://me:pw@host/"):
        assert "gives a secret" in str(environment_problems(word)[0]), word
    assert not environment_problems("NCCL_DEBUG=INFO TOKENIZERS_PARALLELISM=false NCCL_IB_HCA=mlx5")
    status, said, found = say(capsys, "-cn", "smoke", "data.folder=https://me:pw@host/set?token=abc")
    assert status == 0, said
    assert recipe_mapping(found[0])["data"]["folder"] == "https://host/set?token=***"


def test_a_text_of_someone_elses_is_no_reference_in_an_imported_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("${oc.env:HOME}", r"\${x}", r"\\${run.folder}", "a\nrun: {name: evil}"):
        body = yaml.safe_dump({"defaults": ["smoke", "_self_"], **literal({"data": {"folder": text}})})
        (tmp_path / "mine.yaml").write_text(HEAD + body)
        status, said, found = say(capsys, "--config-dir", str(tmp_path), "-cn", "mine")
        assert status == 0, said
        assert found[0].data.folder == text and found[0].run.name == "smoke"


def test_a_run_folder_gives_back_every_text_of_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`stratum train RUN` composes recipe.yaml again: `${HOME}` in a setup line was read as a reference there."""
    parts = [
        "${HOME}",
        "$",
        "{",
        "}",
        "\\",
        "'",
        '"',
        "\n",
        "\t",
        " ",
        "#",
        ":",
        "é",
        "???",
        "${oc.env:USER}",
        "a",
        "- ",
        "%",
    ]
    draw = random.Random(7)
    texts = [
        *parts,
        "\\${x}",
        "\\\\${x}",
        "export P=${HOME}/bin:\"$P\"\nmodule load 'cuda'\n",
        "null",
        "1e3",
        "-1_0",
        ".5",
        "1.",
        "true",
        "0x1f",
        "12:30",
    ]
    texts += ["".join(draw.choices(parts, k=draw.randrange(1, 9))) for _ in range(300)]
    texts = [
        text for text in texts if text != "???"
    ]  # no recipe can say this one: OmegaConf's word for a missing value
    recipe = say(capsys, "-cn", "smoke")[2][0]
    source = next(iter(recipe.data.sources.values()))
    sources = {f"s{number}": replace(source, path=text) for number, text in enumerate(texts)}
    recipe = replace(recipe, data=replace(recipe.data, sources=sources))
    folder = tmp_path / "smoke"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe_mapping(recipe)))
    status, said, found = say(capsys, f"--config-dir={folder}", "-cn", "recipe")
    assert status == 0, said
    assert {name: one.path for name, one in found[0].data.sources.items()} == {
        name: one.path for name, one in sources.items()
    }
    assert recipe_in(folder) == recipe_mapping(recipe)


@pytest.mark.parametrize("words", [["run.name=\x1f"], ["objective.teacher_cache=\x1f"]])
def test_a_plan_shows_control_characters_as_escapes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    stratum.main(["plan", "-cn", "smoke", *words])
    shown = capsys.readouterr()
    assert "\x1f" not in shown.out + shown.err and "\\x1f" in shown.out
