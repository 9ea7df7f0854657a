"""What the server costs over the bare engine: 16 clients stream from it, and the same requests go to an engine directly.

The server is a process of its own with the bench's hybrid, the clients are in this one. They take turns with the bare engine; the
best of all rounds counts. Prints Markdown.

    python -m tests.bench.serving [--clients 16] [--tokens 256] [--rounds 3] [--hidden 256]
"""

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import httpx
import torch
import uvicorn

from data.tokenizer import train_tokenizer
from recipes.schema.data import TokenizerConfig
from tests.bench.inference import PROMPT, VOCAB, load, ours_and_theirs, prompts_of, shapes
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Request, Sampling
from train.serve.app import Served, build_app
from train.serve.worker import Worker


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    return EngineConfig(rows=arguments.clients, context_tokens=PROMPT + arguments.tokens)


def serve(arguments: argparse.Namespace) -> None:
    """Serve the bench's model; prints the port."""
    texts = (path.read_text() for path in sorted(ROOT.glob("train/**/*.py")))
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=VOCAB))
    assert tokenizer.vocab_size == VOCAB
    shape = shapes(arguments.hidden)["hybrid"]
    with ours_and_theirs(shape) as (ours, _), socket.create_server(("127.0.0.1", 0)) as listener:
        engine = InferenceEngine(ours, shape, engine_config(arguments))

        async def run() -> None:
            worker = Worker(engine, most=64)
            served = Served("bench", tokenizer, worker, engine.config.context_tokens, None, None, 0)
            app = build_app(served, key=None, most_body_bytes=1 << 20)
            print(listener.getsockname()[1], flush=True)
            await uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off")).serve(sockets=[listener])

        asyncio.run(run())


async def stream(http: httpx.AsyncClient, prompt: list[int], tokens: int) -> int:
    """One client. -> tokens that it got."""
    call = {
        "model": "bench", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    count = 0
    async with http.stream("POST", "/v1/completions", json=call) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and '"usage"' in line and (usage := json.loads(line[6:]).get("usage")):
                count = usage["completion_tokens"]
    return count


async def all_clients(port: int, prompts: list[list[int]], tokens: int) -> tuple[int, float]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300) as http:
        start = time.perf_counter()
        counts = await asyncio.gather(*(stream(http, prompt, tokens) for prompt in prompts))
        return sum(counts), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.serve:
        return serve(arguments)
    shape = shapes(arguments.hidden)["hybrid"]
    prompts = prompts_of(arguments.clients, PROMPT).tolist()
    command = [sys.executable, "-m", "tests.bench.serving", "--serve"]
    command += [f"--{name}={getattr(arguments, name)}" for name in ("clients", "tokens", "hidden")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            best = [0.0, 0.0]
            with ours_and_theirs(shape) as (ours, _):
                for _ in range(arguments.rounds):
                    count, seconds = asyncio.run(all_clients(port, prompts, arguments.tokens))
                    best[0] = max(best[0], count / seconds)
                    engine = InferenceEngine(ours, shape, engine_config(arguments))
                    start = time.perf_counter()
                    # Token 0 ends a text, as in the server.
                    ended = engine.run(
                        [Request(p, arguments.tokens, sampling=Sampling(0.0), stop=frozenset({0})) for p in prompts]
                    )
                    seconds = time.perf_counter() - start
                    best[1] = max(best[1], sum(e.token is not None for one in ended for e in one) / seconds)
        finally:
            server.kill()
    print(
        f"hidden {arguments.hidden}, {arguments.clients} clients, {arguments.tokens} tokens each, one thread\n\n"
        "| server, tokens/s | bare engine, tokens/s | overhead | machine |\n|---|---|---|---|\n"
        f"| {best[0]:,.0f} | {best[1]:,.0f} | {best[1] / best[0] - 1:.1%} | {load()} |"
    )


if __name__ == "__main__":
    main()
