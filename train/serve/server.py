"""Builds a running server from a recipe: model, engine, worker, HTTP."""

import asyncio
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn

from data.chat.template import ChatTemplate, open_template
from data.tokenizer import Tokenizer
from recipes.schema.errors import RecipeError, StratumError
from recipes.schema.foreign import printable
from recipes.schema.recipe import Recipe
from recipes.schema.tools import ServeConfig
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Thinking
from train.inference.text import draft_tokens, opened
from train.serve.app import Served, build_app
from train.serve.worker import Worker

_GIB = 2**30


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
        name = config.name or recipe.run.name

        async def run() -> int:
            worker = Worker(engine, most=config.rows + config.queue)
            served = Served(
                name,
                loaded.tokenizer,
                worker,
                config.context_tokens,
                template,
                thinking,
                created=int(time.time()),
                speculates=loaded.drafter is not None,
            )
            app = build_app(served, key=key, most_body_bytes=int(config.body_mib * 2**20))
            server = uvicorn.Server(
                uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=config.drain_s)
            )
            listener.listen(1024)  # a client that reads the address below may connect before uvicorn accepts
            host, port = listener.getsockname()[:2]
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            sys.stdout.write(f"Serving {printable(name)} ({loaded.checkpoint}) at http://{address}\n")
            if not key and host not in ("127.0.0.1", "::1"):
                sys.stdout.write("Anyone who reaches this address can use it: there is no --key-file.\n")
            sys.stdout.flush()
            # uvicorn stops at SIGTERM and SIGINT, then raises them again for the previous handlers: those must do nothing.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _no_action)
            async with _ending_with(worker, server):
                await server.serve(sockets=[listener])
            error = await worker.stop()
            if error is not None:
                raise StratumError(f"the engine failed: {error!r}") from error
            return 0

        return asyncio.run(run())


def _no_action(_number: int, _frame: object) -> None:
    pass


@asynccontextmanager
async def _ending_with(worker: Worker, server: uvicorn.Server) -> AsyncIterator[None]:
    """Stop the server when the engine has stopped."""

    async def watch() -> None:
        await asyncio.shield(worker.ended)
        server.should_exit = True

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


@contextmanager
def _template(config: ServeConfig, tokenizer: Tokenizer) -> Iterator[ChatTemplate | None]:
    """The template of chats, checked; None without one."""
    if config.chat_template is None:
        yield None
        return
    with open_template(config.chat_template, tokenizer) as template:
        _ = template.stop_ids  # a template that cannot be used is reported before the server starts
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
