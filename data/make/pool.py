"""Processes that make shards. Each loads the tokenizer once, then makes one shard after the other.

If a worker dies, the error names its shard. If this process dies, even by SIGKILL, the workers find their pipe closed after
the next batch and end.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from data.make.shard_job import ShardJob, make_shard
from data.tokenizer import Tokenizer, load_tokenizer
from recipes.schema.data import TokenizerConfig
from recipes.schema.errors import DataError

Advance = Callable[[str, int, int, int], None]
"""Called with a source's name, and the stored bytes, bytes of text and tokens done since the call before."""


def make_shards(
    jobs: Sequence[ShardJob],
    tokenizer: Tokenizer,
    tokenizer_file: Path,
    config: TokenizerConfig,
    *,
    workers: int,
    advance: Advance,
) -> None:
    """Make all shards with up to `workers` processes (threads if there are fewer shards). DataError at the first failure.

    tokenizer: used here, for a single shard or worker. Worker processes load theirs from tokenizer_file.
    """
    count = min(workers, len(jobs))
    threads = max(1, workers // max(1, count))
    if count <= 1:
        for job in jobs:
            make_shard(job, tokenizer, threads=threads, report=_for_source(advance, job.name))
        return
    context = multiprocessing.get_context("spawn")
    waiting = sorted(
        jobs, key=lambda job: -job.size
    )  # the largest first, so that no worker starts it last while the others idle
    connections: dict[Connection, tuple[BaseProcess, ShardJob]] = {}
    processes = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(
                target=_run_worker, args=(theirs, tokenizer_file, config, threads), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            connections[ours] = (process, _send_next(ours, waiting))
        while connections:
            for connection in wait(list(connections)):
                assert isinstance(connection, Connection)
                process, job = connections[connection]
                match _receive(connection, process, job):
                    case ("progress", stored, text, tokens):
                        advance(job.name, stored, text, tokens)
                    case ("failed", message):
                        raise DataError(message)
                    case "done":
                        if waiting:
                            connections[connection] = (process, _send_next(connection, waiting))
                        else:
                            connection.close()
                            del connections[connection]
    finally:
        for process in processes:
            if connections:  # something failed: the other results are of no use
                process.terminate()
            process.join()


def _for_source(advance: Advance, name: str) -> Callable[[int, int, int], None]:
    return lambda stored, text, tokens: advance(name, stored, text, tokens)


def _send_next(connection: Connection, waiting: list[ShardJob]) -> ShardJob:
    job = waiting.pop(0)
    connection.send(job)
    return job


def _receive(connection: Connection, process: BaseProcess, job: ShardJob) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        process.join(timeout=5)
        raise DataError(
            f"the process that made {job.prefix} ended by itself with exit status {process.exitcode} (-9 usually means that "
            f"memory ran out). Finished shards are kept: run again with a lower data.workers or data.shard_bytes."
        ) from error


def _run_worker(connection: Connection, tokenizer_file: Path, config: TokenizerConfig, threads: int) -> None:
    """A worker process: receives jobs and sends progress and results, until the pipe closes."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # the tokenizers library's own thread pool
    tokenizer: Tokenizer | None = None

    def report(stored: int, text: int, tokens: int) -> None:
        connection.send(("progress", stored, text, tokens))

    try:
        while True:
            job: ShardJob = connection.recv()
            try:
                tokenizer = tokenizer or load_tokenizer(tokenizer_file, config)
                make_shard(job, tokenizer, threads=threads, report=report)
            except DataError as error:
                connection.send(("failed", str(error)))
                return
            except MemoryError:
                connection.send(("failed", f"out of memory making {job.prefix}. Lower data.workers."))
                return
            except OSError as error:
                if isinstance(error, BrokenPipeError):  # the parent is gone; not an error of the disk
                    raise
                connection.send(("failed", f"cannot write {job.folder}: {error}. Finished shards are kept."))
                return
            connection.send("done")
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
