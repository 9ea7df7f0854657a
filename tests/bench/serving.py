"""What the server costs over the bare engine: 16 clients stream from it, and the same requests go to an engine directly.

The server has the bench's hybrid. The clients are one process with plain sockets that only counts, so that it takes little from
the cores that the server needs. They take turns with the bare engine; the best of all rounds counts. Prints Markdown, with the
processor time that a token takes in the engine's process, in the HTTP process and in the clients.

    python -m tests.bench.serving [--clients 16] [--tokens 256] [--rounds 3] [--hidden 256]
"""

import argparse
import json
import re
import selectors
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psutil
import torch

from data.tokenizer import train_tokenizer
from recipes.schema.data import TokenizerConfig
from tests.bench.inference import PROMPT, VOCAB, load, ours_and_theirs, prompts_of, shapes
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.request import Request, Sampling
from train.serve.app import Served, build_app
from train.serve.engine_loop import EngineLoop
from train.serve.server import answer_clients, start_http
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

        stats = engine.stats()

        async def answer(pipe: Connection) -> None:
            worker = Worker(pipe, stats, most=64)
            served = Served("bench", tokenizer, worker, engine.config.context_tokens, None, None, 0)
            await answer_clients(build_app(served, key=None, most_body_bytes=1 << 20), worker, listener)

        process, pipe = start_http(answer)
        print(json.dumps([listener.getsockname()[1], process.pid]), flush=True)
        EngineLoop(engine, pipe).run()
        process.join()


def stream_all(port: int, prompts: list[list[int]], tokens: int) -> None:
    """All clients. Prints [tokens that they got, seconds, seconds of processor time]."""
    calls = []
    for prompt in prompts:
        call = {
            "model": "bench", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        body = json.dumps(call).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        calls.append(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    lines = selectors.DefaultSelector()
    tails: dict[int, bytes] = {}
    start, start_cpu = time.perf_counter(), time.process_time()
    for call_bytes in calls:
        line = socket.create_connection(("127.0.0.1", port))
        line.sendall(call_bytes)
        lines.register(line, selectors.EVENT_READ, line)
        tails[line.fileno()] = b""
    while lines.get_map():
        for ready, _ in lines.select():
            part = ready.data.recv(1 << 16)
            tails[ready.fd] = (tails[ready.fd] + part)[-1000:]
            if not part:
                lines.unregister(ready.fileobj)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    count = sum(int(re.findall(rb'"completion_tokens":(\d+)', tail)[-1]) for tail in tails.values())
    print(json.dumps([count, seconds, cpu]))


def cpu_of(pid: int) -> float:
    """Seconds of processor time that a process has taken so far."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.serve:
        return serve(arguments)
    shape = shapes(arguments.hidden)["hybrid"]
    prompts = prompts_of(arguments.clients, PROMPT).tolist()
    if arguments.port:
        return stream_all(arguments.port, prompts, arguments.tokens)
    command = [sys.executable, "-m", "tests.bench.serving"]
    command += [f"--{name}={getattr(arguments, name)}" for name in ("clients", "tokens", "hidden")]
    with subprocess.Popen([*command, "--serve"], stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            assert server.stdout is not None
            port, http = json.loads(server.stdout.readline())
            bare, best, cpus = 0.0, 0.0, [0.0] * 3
            with ours_and_theirs(shape) as (ours, _):
                for _ in range(arguments.rounds):
                    before = [cpu_of(server.pid), cpu_of(http)]
                    ran = subprocess.run(
                        [*command, f"--port={port}"], stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT
                    )
                    count, seconds, clients = json.loads(ran.stdout)
                    if count / seconds > best:
                        best = count / seconds
                        spent = [cpu_of(server.pid) - before[0], cpu_of(http) - before[1], clients]
                        cpus = [1e6 * one / count for one in spent]
                    engine = InferenceEngine(ours, shape, engine_config(arguments))
                    start = time.perf_counter()
                    # Token 0 ends a text, as in the server.
                    ended = engine.run(
                        [Request(p, arguments.tokens, sampling=Sampling(0.0), stop=frozenset({0})) for p in prompts]
                    )
                    seconds = time.perf_counter() - start
                    bare = max(bare, sum(e.token is not None for one in ended for e in one) / seconds)
        finally:
            server.terminate()
    print(
        f"hidden {arguments.hidden}, {arguments.clients} clients, {arguments.tokens} tokens each, one thread\n\n"
        "| server, tokens/s | bare engine, tokens/s | overhead | engine process, us/token | HTTP process, us/token "
        "| clients, us/token | machine |\n|---|---|---|---|---|---|---|\n"
        f"| {best:,.0f} | {bare:,.0f} | {bare / best - 1:.1%} | {' | '.join(f'{cpu:.0f}' for cpu in cpus)} | {load()} |"
    )


if __name__ == "__main__":
    main()
