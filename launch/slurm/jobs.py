"""The Slurm jobs of a run, from the numbers in its folder. `stratum status` and `stratum cancel` need no more of this room."""

from launch.queue import QueuedJob, jobs_of_script, look_up
from launch.runs import RunFolder
from recipes.schema.foreign import read_bounded_text


def active_jobs(run: RunFolder) -> list[QueuedJob]:
    """Jobs of a run that wait or run, including jobs that a user submitted with its script."""
    numbers = {*job_numbers(run)[-8:], *jobs_of_script(run.logs / "job.sh")}
    return [job for job in look_up(sorted(numbers)) if job.is_active]


def job_numbers(run: RunFolder) -> list[int]:
    """Numbers of all jobs of this run, oldest first; none if the file is not a list of numbers."""
    try:
        return [int(word) for word in read_bounded_text(run.logs / "jobs").split() if len(word) < 19]
    except (OSError, ValueError):
        return []
