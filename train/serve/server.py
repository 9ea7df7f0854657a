"""Builds a running server from a recipe: model and engine in this process, HTTP in another."""

import asyncio
import contextlib
import math
import multiprocessing
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.server import HANDLED_SIGNALS

from data.chat.template import ChatTemplate, open_template
from data.tokenizer import Tokenizer
from recipes.schema.encoder_rules import media_placeholders
from recipes.schema.errors import RecipeError, StratumError
from recipes.schema.foreign import printable
from recipes.schema.recipe import Recipe
from recipes.schema.tools import ServeConfig
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Thinking
from train.inference.text import draft_tokens, opened
from train.serve.app import Served, build_app
from train.serve.engine_loop import EngineLoop
from train.serve.worker import Worker

_GIB = 2**30
_STOPPING = "the server is stopping"
_LAST_WRITES_S = 5
"""Seconds for clients to read the error that ends their requests."""


def serve(recipe: Recipe, config: ServeConfig, listener: socket.socket, *, key: str | None) -> int:
    """Serve until SIGTERM or SIGINT. -> exit status: 0, or 1 if the engine failed."""
    guesses = draft_tokens(config)
    with (
        opened(recipe, checkpoint=config.checkpoint, speculate=config.speculate) as loaded,
        _template(config, loaded.tokenizer) as template,
    ):
        engine = InferenceEngine(
            loaded.model,
            recipe.model,
            EngineConfig(
                rows=config.rows,
                context_tokens=config.context_tokens,
                memory_bytes=None if config.memory_gib is None else int(config.memory_gib * _GIB),
                step_tokens=config.step_tokens,
                prefix_blocks=config.prefix_blocks,
                draft_tokens=guesses,
            ),
            drafter=loaded.drafter,
            fingerprint=loaded.fingerprint,
        )
        thinking = _thinking(config, loaded.tokenizer)
        _ = loaded.tokenizer.most_bytes_per_token  # it may take a second: before the fork, not while clients wait
        name = config.name or recipe.run.name

        async def answer(pipe: Connection) -> None:
            worker = Worker(pipe, stats, most=config.rows + config.queue)
            served = Served(
                name,
                loaded.tokenizer,
                worker,
                config.context_tokens,
                template,
                thinking,
                created=int(time.time()),
                speculates=loaded.drafter is not None,
                placeholders=media_placeholders(recipe),
            )
            app = build_app(served, key=key, most_body_bytes=int(config.body_mib * 2**20))
            await answer_clients(app, worker, listener, drain_s=config.drain_s)

        stats = engine.stats()
        listener.listen(1024)  # a client that reads the address below may connect before uvicorn accepts
        host, port = listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        with _held_signals():
            sys.stdout.write(f"Serving {printable(name)} ({loaded.checkpoint}) at http://{address}\n")
            if not key and host not in ("127.0.0.1", "::1"):
                sys.stdout.write("Anyone who reaches this address can use it: there is no --key-file.\n")
            sys.stdout.flush()
            process, pipe = start_http(answer)
            listener.close()  # it is the other process's now
            # SIGTERM also for Ctrl-C, which the other process gets too: a second Ctrl-C there means haste.
            for number in HANDLED_SIGNALS:
                signal.signal(number, lambda _number, _frame: process.terminate())
        try:
            EngineLoop(engine, pipe).run()
        except Exception as error:
            raise StratumError(f"the engine failed: {error!r}") from error
        finally:
            process.join()
        if process.exitcode:
            raise StratumError(f"the HTTP process failed: status {process.exitcode}.")
        return 0


def start_http(answer: Callable[[Connection], Coroutine[Any, Any, None]]) -> tuple[BaseProcess, Connection]:
    """Run `answer` in a new process with one end of a pipe. -> (the process, the other end).

    The process is a fork, so that it has the tokenizer and the template as they were loaded. It must not use torch: torch's
    threads and a GPU are not usable in a fork.
    """
    ours, theirs = multiprocessing.Pipe()

    def run() -> None:
        ours.close()  # or it would not notice that this process has gone
        asyncio.run(answer(theirs))

    process = multiprocessing.get_context("fork").Process(target=run, name="HTTP")
    process.start()
    theirs.close()
    return process, ours


async def answer_clients(app: ASGIApp, worker: Worker, listener: socket.socket, *, drain_s: int | None = None) -> None:
    """Serve HTTP until SIGTERM or SIGINT, or until the engine has ended; then end the engine.

    Open requests may continue for `drain_s` seconds, or until a second SIGINT; then they end with an error.
    """

    async def quiet(scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # uvicorn would print a traceback
            await app(scope, receive, send)

    # uvicorn's own limit is for clients that do not read their error.
    most_s = None if drain_s is None else drain_s + _LAST_WRITES_S
    server = uvicorn.Server(
        uvicorn.Config(quiet, log_level="warning", lifespan="off", timeout_graceful_shutdown=most_s)
    )
    # uvicorn takes these signals only while it serves, and afterwards it raises them again for the previous handlers.
    for number in HANDLED_SIGNALS:
        signal.signal(number, server.handle_exit)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
    async with _ending_with(worker, server, drain_s):
        await server.serve(sockets=[listener])
    worker.end_open(_STOPPING)
    await worker.stop()


@contextlib.contextmanager
def _held_signals() -> Iterator[None]:
    """SIGTERM and SIGINT wait until both processes have handlers for them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)


@contextlib.asynccontextmanager
async def _ending_with(worker: Worker, server: uvicorn.Server, drain_s: int | None) -> AsyncIterator[None]:
    """Stop the server when the engine has stopped, and end the requests that are open `drain_s` seconds after a signal."""

    async def watch() -> None:
        await asyncio.shield(worker.ended)
        server.should_exit = True

    async def drain() -> None:
        # Signal handlers set both flags. After a second Ctrl-C uvicorn waits for its connections all the same.
        while not server.should_exit:
            await asyncio.sleep(0.1)
        end = math.inf if drain_s is None else time.monotonic() + drain_s
        while not server.force_exit and time.monotonic() < end:
            await asyncio.sleep(0.1)
        worker.end_open(_STOPPING)

    watching = [asyncio.create_task(watch()), asyncio.create_task(drain())]
    try:
        yield
    finally:
        for task in watching:
            task.cancel()


@contextlib.contextmanager
def _template(config: ServeConfig, tokenizer: Tokenizer) -> Iterator[ChatTemplate | None]:
    """The template of chats, checked; None without one."""
    if config.chat_template is None:
        yield None
        return
    with open_template(config.chat_template, tokenizer) as template:
        _ = template.stop_ids  # a template that cannot be used is reported before the server starts
        template.close()  # the HTTP process starts the template's process for itself
        yield template


def _thinking(config: ServeConfig, tokenizer: Tokenizer) -> Thinking | None:
    """The markers as token ids; the budget is set by each call."""
    if config.think_start is None and config.think_end is None:
        return None
    if not config.think_start or not config.think_end:
        raise RecipeError("--think-start and --think-end belong together: give both or neither.")
    start, end = (_marker_ids(tokenizer, marker) for marker in (config.think_start, config.think_end))
    newlines = frozenset(id for id in range(tokenizer.vocab_size) if tokenizer.bytes_of(id).endswith(b"\n"))
    return Thinking(budget=0, start=start, end=end, newlines=newlines)


def _marker_ids(tokenizer: Tokenizer, marker: str) -> tuple[int, ...]:
    special = tokenizer.special
    return (special[marker],) if marker in special else tuple(tokenizer.encode(marker))
