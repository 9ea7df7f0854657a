"""Words of a command line keep the meaning that the user wrote; words that cannot be read are quoted in the error."""

import json
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from recipes_composed import composed

from launch.plan.command import main as plan
from recipes.schema import command
from recipes.schema.command import dotted_keys, quote_texts, replace_groups, run_command
from recipes.schema.engine_switches import SWITCHES
from recipes.schema.errors import USER_ERRORS
from recipes.schema.read import read_recipe, recipe_from_mapping
from recipes.schema.recipe import Recipe


def read(word: str) -> object:
    """The value that Hydra reads from one word, as our command line passes it on."""
    return OverridesParser.create().parse_override(quote_texts(["program", word])[1]).value()


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    status = run_command(
        lambda config: int(read_recipe(config) is None),
        words,
        program="train",
        keys=dotted_keys(Recipe),
        user_errors=USER_ERRORS,
    )
    assert status == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "word",
    [
        "run.name=two words", "run.name=123", "run.name=true", "run.name=1_000", "run.name=a;b", "run.name=a(b",
        "run.name=it's", 'run.name=say "hi" \\', "launch.container.image=nvcr.io#nvidia/pytorch:24.01",
        "launch.container.mounts=/a:/b,/c:/d", "launch.slurm.options=--comment='my job' --constraint=[a|b]",
        "launch.slurm.setup=module load cuda; export A=1", "launch.environment=A=1 B={2}",
        "data.sources.mine.path=s3://b/dt=2024-01-01/*.parquet", "data.sources.mine.path=part-{000..063}.jsonl",
        "data.sources.mine.template={title}", "data.tokenizer.end_of_document=<|e|>",
    ],
)  # fmt: skip
def test_a_text_field_takes_its_value_as_written(word: str) -> None:
    assert read(word) == word.split("=", 1)[1]


@given(st.text(st.characters(codec="ascii", exclude_characters="\n\r$")))
def test_any_text_reads_back_as_written(text: str) -> None:
    plain = {"null": None}.get(text.strip().lower(), text)
    if text[:1] not in ("'", '"', "[") and text == text.strip() and "\\" not in text and plain is not None:
        assert read(f"run.name={text}") == text


def test_numbers_lists_null_quotes_and_references_keep_their_types() -> None:
    assert read("optim.lr=1e-3") == 1e-3 and read("data.phases=[]") == []
    assert read("objective.teacher=null") is None and read("run.name='a b'") == "a b"
    assert read("objective.teacher=${compress.parent}") == "${compress.parent}"
    assert read("compress.search_layers=[52,54]") == [52, 54] and read("compress.search_layers=52,54") == "52,54"
    assert quote_texts(["run.name=a,b"], is_sweep=True) == ["run.name=a,b"]


def test_sources_given_whole_replace_and_given_one_by_one_join() -> None:
    whole = recipe_from_mapping(
        composed("-cn", "smoke", "data.sources={mine:{path:words}}", "data.sources.mine.weight=2")
    )
    assert {name: source.weight for name, source in whole.data.sources.items()} == {"mine": 2.0}
    joined = recipe_from_mapping(
        composed("-cn", "smoke", "data.sources.mine.path=words", "data.sources.python.max_epochs=3")
    )
    assert set(joined.data.sources) == {"shakespeare", "python", "mine"}
    assert joined.data.sources["python"].max_epochs == 3
    assert replace_groups(["p", "data.tokenizer.special_tokens={a:1}"])[1:] == [
        "~data.tokenizer.special_tokens", "+data.tokenizer.special_tokens={a:1}",
    ]  # fmt: skip


def test_a_recipe_that_inherits_may_leave_the_others_sources_out(tmp_path: Path) -> None:
    body = "run: {name: mine}\ndata: {sources: {python: {path: words}}}\n"
    (tmp_path / "mixed.yaml").write_text("defaults: [smoke, _self_]\n" + body)
    (tmp_path / "alone.yaml").write_text("defaults: [smoke, data/no_sources, _self_]\n" + body)
    mixed, alone = (
        recipe_from_mapping(composed(f"--config-dir={tmp_path}", "-cn", name)).data.sources
        for name in ("mixed", "alone")
    )
    assert set(mixed) == {"shakespeare", "python"} and mixed["python"].max_bytes == 3_000_000
    assert set(alone) == {"python"} and alone["python"].max_bytes is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.sources.pyhton.weight=2"], "Or did you mean data.sources.python?"),
        (["data.sources.python.wieght=2"], "Did you mean weight?"),
        (["data.row_tokens=a#b"], "'data.row_tokens=\"a#b\"'"),
        (["data.sources={mine:{path:s3://b/day=1/*}}"], "quote each text that contains"),
        (
            ['data.tokenizer.special_tokens={"<|im_start|>": 1}'],
            "key in braces cannot be quoted on a command line: write",
        ),
        (
            ["data.tokenizer.special_tokens={<|im_start|>: 1}"],
            "Keys cannot be quoted: write a name with other characters",
        ),
        (["optim.lrr=1"], "Did you mean optim.lr?"),
    ],
)
def test_mistyped_words_are_explained(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(capsys, "-cn", "smoke", *words)


def test_the_quoted_word_of_an_error_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "-cn", "smoke", "+other.field=a=b #c")
    (word,) = shlex.split(said.strip().rsplit("for the shell: ", 1)[1])
    assert OverridesParser.create().parse_override(word).value() == "a=b #c"


def test_the_plan_says_which_sources_a_recipe_inherits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "run: {name: not_there}\ndata: {sources: {mine: {path: words}}}\n"
    (tmp_path / "mixed.yaml").write_text("defaults: [smoke, _self_]\n" + body)
    (tmp_path / "alone.yaml").write_text("defaults: [smoke, data/no_sources, _self_]\n" + body)
    said = {}
    for name in ("mixed", "alone", "smoke"):
        assert (
            plan([f"--config-dir={tmp_path}", "-cn", name, "run.name=not_there", "data.folder=not_there", "--json"])
            == 0
        )
        said[name] = [line for line in json.loads(capsys.readouterr().out)["warnings"] if "inherited" in line]
    assert said["alone"] == said["smoke"] == []
    assert "shakespeare, python are inherited, and mixed with those that mixed names, mine" in said["mixed"][0]


def test_an_error_of_the_recipe_is_left_to_rank_0_of_torchrun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks wait, and torchrun ends them; if it does not, they say it too."""
    waits: list[float] = []
    monkeypatch.setattr(command.time, "sleep", lambda seconds: waits.append(len(capsys.readouterr().err) or seconds))
    for rank, run_id, expected in (("1", "x", [10.0]), ("0", "x", []), ("1", "", [])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x") if run_id else monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        assert "unknown recipe key 'model.hiden'" in refusal(capsys, "-cn", "smoke", "model.hiden=3")
        assert waits == expected
        waits.clear()


def test_megatrons_switches_are_refused_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that would change nothing without an error, by any spelling, and each is in docs/megatron.md."""
    for word, reason in (
        ("model.cuda_graph_impl=full_iteration", "the switch changes nothing"),
        ("parallel.cpu-offloading=true", "The stack of hybrids ignores it. Use parallel.recompute=full."),
        ("parallel.fsdp=true", "gives no gradient to conv1d, dt_bias, A_log and D"),
        ("parallel.recompute_modules=[mlp]", "not a recipe field yet"),
    ):
        assert reason in refusal(capsys, "-cn", "smoke", word)
    page = (Path(__file__).resolve().parents[2] / "docs" / "megatron.md").read_text()
    assert not [
        name
        for name in SWITCHES
        if name not in page and not name.startswith(("recompute_granularity", "recompute_num"))
    ]
    assert sum(switch.silent for switch in SWITCHES.values()) >= 4
