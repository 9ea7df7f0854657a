"""A rank that fails twice in a row is left out: a spare GPU takes its place, or the run continues with fewer replicas."""

import re
from dataclasses import replace
from pathlib import Path

from local_runs import finish, start
from tiny import recipe_with

from launch.local.failing_rank import Team


def test_a_run_continues_with_fewer_processes_when_a_rank_fails_twice(tmp_path: Path) -> None:
    failing = ("--steps", "30", "--fail", "2:25:kill:always")
    out, err = finish(start(tmp_path / "run", 4, *failing, options=("--least", "2")), status=0)
    assert out.count("rank 0 of 4 starts after step 20\n") == 1
    assert out.endswith("rank 0 of 2 starts after step 20\nfinished\n"), (
        "8 rows a step: three replicas do not divide them"
    )
    assert "launch: rank 2 failed first 2 times in a row: continuing with 2 instead of 4 processes" in err


def test_a_run_grows_again_after_a_save(tmp_path: Path) -> None:
    """Rank 2 of four fails twice and two go on; they save and stop after half a second, and four finish the run."""
    failing = ("--steps", "60", "--fail", "2:25:kill:twice")
    out, err = finish(start(tmp_path / "run", 4, *failing, options=("--least", "2", "--regrow", "0.5")), status=0)
    assert "launch: rank 2 failed first 2 times in a row: continuing with 2 instead of 4 processes" in err
    assert "launch: after 0.5 s (launch.regrow_s): continuing with all 4 processes again" in err
    assert re.search(r"rank 0 of 4 starts after step [2-5]\d\nfinished\n$", out)


def twice(team: Team, rank: int) -> Team:
    return team.after_failure(rank, has_progress=True).after_failure(rank, has_progress=False)


def test_a_spare_gpu_takes_the_place_of_one_that_fails() -> None:
    recipe = recipe_with(**{"run.global_rows": 4, "launch.least_processes": 1})
    team = twice(Team(2, ("GPU-a", "GPU-b", "GPU-c")), 1)
    found = team.without_suspect(recipe, may_shrink=True)
    assert (
        found is not None
        and found[0] == Team(2, ("GPU-a", "GPU-c"), full=None)
        and "without GPU GPU-b, with a spare" in found[1]
    )
    found = twice(found[0], 0).without_suspect(recipe, may_shrink=True)
    assert found is not None and found[0].processes == 1 and found[0].devices == ("GPU-c",), "no spare is left"
    grown = found[0].grown()
    assert grown is not None and grown[0] == Team(2, ("GPU-a", "GPU-c")) and grown[0].grown() is None
    assert "continuing without GPU GPU-a with 1 instead of 2 processes" in found[1]


def test_a_team_is_kept_unless_one_rank_fails_without_progress_and_fewer_can_train() -> None:
    recipe = recipe_with(**{"run.global_rows": 4, "launch.least_processes": 2, "parallel.tensor": 2})
    team = Team(4)
    for (rank, has_progress), expected in (((1, True), 1), ((2, False), 1), ((2, False), 2), ((2, True), 1)):
        team = team.after_failure(rank, has_progress=has_progress)
        assert team.failures == expected
    assert team.without_suspect(recipe, may_shrink=True) is None
    team = twice(Team(4), 3)
    found = team.without_suspect(recipe, may_shrink=True)
    assert found is not None and found[0].processes == 2, "tensor=2 does not divide 3"
    assert team.without_suspect(recipe, may_shrink=False) is None, "without a checkpoint no other layout can continue"
    never = replace(recipe, launch=replace(recipe.launch, least_processes=None))
    assert team.without_suspect(never, may_shrink=True) is None
