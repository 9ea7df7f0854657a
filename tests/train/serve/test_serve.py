"""`stratum serve` with a real server process, OpenAI's client, and clients that misbehave."""

import asyncio
import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from browser import CHROMIUM, open_page
from openai import AsyncOpenAI, NotFoundError, OpenAI
from pruning_folder import lay_out, shell
from ranks import run_ranks

from recipes.schema.foreign import parse_yaml
from recipes.schema.read import recipe_from_mapping
from train import stratum
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.text import Opened, opened
from train.serve import body
from train.serve.app import Served, build_app
from train.serve.engine_loop import EngineLoop
from train.serve.refusal import ServerRefusal
from train.serve.worker import Worker

ROOT = Path(__file__).resolve().parents[3]
PROMPT = "line 7 of "
CONTEXT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two steps."""
    root = tmp_path_factory.mktemp("serve")
    lay_out(root)
    for command in ("prepare", "train"):
        status, output = run_ranks(1, shell, root, [command, "-cn", "little"])[0]
        assert status == 0, output
    (root / "key.txt").write_text("open sesame\n")
    return root


class Server:
    """A server process; its address is the first thing it prints."""

    def __init__(self, folder: Path, *words: str) -> None:
        command = [sys.executable, "-P", "-m", "train.stratum", "serve", "runs/parent", "--port", "0", *words]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,  # for Ctrl-C, which a terminal sends to all processes of a group
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            self.process.kill()
            raise AssertionError(line + self.process.communicate()[1])
        self.url = found[0]

    def client(self, key: str = "open sesame") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics", timeout=120).text.splitlines()
        return {
            name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        }

    def idle_metrics(self) -> dict[str, float]:
        """The metrics once no request is open."""
        for _ in range(400):
            found = self.metrics()
            if not found["stratum_requests_open"] and not found["stratum_requests_running"]:
                return found
            time.sleep(0.05)
        raise AssertionError(f"requests stay open: {found}")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    words = ["--context-tokens", str(CONTEXT), "--rows", "8", "--queue", "60", "--chat-template", "plain"]
    words += ["--speculate", "lookup"]  # so that all of these tests see several tokens at a time
    server = Server(folder, *words, "--key-file", "key.txt", "--body-mib", "0.1", "--prefix-blocks", "0")
    yield server
    server.process.kill()
    server.process.communicate()


def test_the_openai_client_gets_completions(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["parent"]
    call = {"model": "parent", "prompt": PROMPT, "max_tokens": 12, "temperature": 0.0}
    whole = client.completions.create(**call, logprobs=3)
    choice = whole.choices[0]
    assert choice.finish_reason in ("length", "stop") and whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert choice.logprobs is not None and choice.logprobs.top_logprobs is not None
    for name, value, top in zip(
        choice.logprobs.tokens or [], choice.logprobs.token_logprobs or [], choice.logprobs.top_logprobs, strict=True
    ):
        assert math.isclose(top[name], value) and value == max(top.values())  # greedy takes the likeliest

    parts = list(client.completions.create(**call, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts[:-1]) == choice.text
    assert parts[-1].usage == whole.usage

    # The log-probabilities of the same text, read as a prompt.
    echo = client.completions.create(
        model="parent", prompt=PROMPT + choice.text, max_tokens=0, echo=True, logprobs=0
    ).choices[0]
    assert echo.text == PROMPT + choice.text and echo.logprobs is not None
    assert echo.logprobs.token_logprobs is not None and echo.logprobs.token_logprobs[0] is None
    if echo.logprobs.tokens[-len(choice.logprobs.tokens) :] == choice.logprobs.tokens:  # cut into the same tokens
        for ours, again in zip(choice.logprobs.token_logprobs[::-1], echo.logprobs.token_logprobs[::-1], strict=False):
            assert abs(ours - again) <= 1e-5


def test_guesses_change_no_answer(server: Server) -> None:
    client, before = server.client(), server.idle_metrics()
    call = {"model": "parent", "prompt": [5, 6, 7, 8] * 3, "max_tokens": 40, "extra_body": {"ignore_eos": True}}
    for temperature in (0.0, 1.0):
        found = client.completions.create(**call, temperature=temperature, seed=3, logprobs=2)
        plain = client.completions.create(
            **call | {"extra_body": {"ignore_eos": True, "draft_tokens": 0}},
            temperature=temperature,
            seed=3,
            logprobs=2,
        )
        assert found.choices[0].text == plain.choices[0].text
        pairs = zip(found.choices[0].logprobs.token_logprobs, plain.choices[0].logprobs.token_logprobs, strict=True)
        assert all(abs(ours - theirs) < 1e-5 for ours, theirs in pairs)
        details = [answer.usage.completion_tokens_details for answer in (found, plain)]
        assert (details[1].accepted_prediction_tokens, details[1].rejected_prediction_tokens) == (0, 0)
        if temperature == 0:
            assert details[0].accepted_prediction_tokens + details[0].rejected_prediction_tokens > 0
    after = server.idle_metrics()
    guessed, accepted = (
        after[name] - before[name] for name in ("stratum_guessed_tokens_total", "stratum_accepted_tokens_total")
    )
    assert guessed > 0 and 0 <= accepted <= guessed and after["stratum_speculation_tokens_per_step"] >= 1


def test_choices_and_seeds(server: Server) -> None:
    client = server.client()
    call = {"model": "parent", "prompt": [PROMPT, "again"], "max_tokens": 10, "temperature": 1.0, "seed": 5}
    first, again = (client.completions.create(**call, n=3).choices for _ in range(2))
    assert [choice.text for choice in first] == [choice.text for choice in again]
    assert [choice.index for choice in first] == [0, 1, 2, 3, 4, 5]
    assert len({choice.text for choice in first}) == 6
    # A choice depends on its own seed only: the second of three is the first of the next seed.
    one = client.completions.create(**{**call, "prompt": PROMPT, "seed": 6}).choices[0]
    assert one.text == first[1].text


def test_stop_strings_end_a_text_wherever_tokens_end(server: Server) -> None:
    client = server.client()
    call = {"model": "parent", "prompt": PROMPT, "max_tokens": 40, "temperature": 0.0}
    whole = client.completions.create(**call).choices[0].text
    assert len(whole) > 8
    for begin, length in ((1, 1), (3, 2), (5, 3), (4, 4)):
        stop = whole[begin : begin + length]
        expected = whole[: whole.index(stop)]
        for stream in (False, True):
            answer = client.completions.create(**call, stop=["\x00never", stop], stream=stream)
            parts = list(answer) if stream else [answer]
            assert "".join(part.choices[0].text for part in parts) == expected
            assert parts[-1].choices[0].finish_reason == "stop"
    server.idle_metrics()


def test_chats(server: Server) -> None:
    client = server.client()
    messages = [
        {"role": "user", "content": "line 3"},
        {"role": "assistant", "content": "of 9"},
        {"role": "user", "content": "?"},
    ]
    call = {"model": "parent", "messages": messages, "max_tokens": 8, "temperature": 0.0}
    whole = client.chat.completions.create(**call, logprobs=True, top_logprobs=2)
    as_text = "User: line 3\n\nAssistant: of 9\n\nUser: ?\n\nAssistant:"
    plain = client.completions.create(model="parent", prompt=as_text, max_tokens=8, temperature=0.0)
    assert whole.choices[0].message.content == plain.choices[0].text
    content = whole.choices[0].logprobs.content
    assert (
        b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace").startswith(plain.choices[0].text[:4])
    )
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    parts = list(client.chat.completions.create(**call, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == plain.choices[0].text


def test_64_clients_get_the_answers_that_each_gets_alone(server: Server) -> None:
    prompts = [f"line {n} of " for n in range(64)]
    call = {"model": "parent", "max_tokens": 12, "temperature": 0.0}
    alone = [server.client().completions.create(prompt=prompt, **call).choices[0].text for prompt in prompts[::9]]

    async def everyone() -> list[str]:
        async with AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="open sesame", max_retries=0, timeout=120
        ) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    async def ask(client: AsyncOpenAI, prompt: str) -> str:
        if len(prompt) % 2:
            return (await client.completions.create(prompt=prompt, **call)).choices[0].text
        stream = await client.completions.create(prompt=prompt, **call, stream=True)
        return "".join([part.choices[0].text async for part in stream])

    assert asyncio.run(everyone())[::9] == alone


def test_clients_that_vanish_give_their_memory_back(server: Server) -> None:
    before = server.idle_metrics()
    call = {"model": "parent", "prompt": PROMPT, "max_tokens": 50, "ignore_eos": True}
    head = {"authorization": "Bearer open sesame"}
    for streams in (True, False):
        body = json.dumps({**call, "stream": streams, "n": 4}).encode()
        for _ in range(6):
            host, port = server.url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as line:
                line.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    + f"Authorization: {head['authorization']}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                    + body
                )
                if streams:
                    line.recv(100)
    after = server.idle_metrics()
    pages = [name for name in before if name.startswith("stratum_free_pages")]
    assert pages and [after[name] for name in pages] == [before[name] for name in pages]
    # A slow reader loses nothing.
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**call, "stream": True}, headers=head, timeout=120
    ) as answer:
        lines = []
        for line in answer.iter_lines():
            time.sleep(0.01)
            lines.append(line)
    assert lines[-2] == "data: [DONE]" or lines[-1] == "data: [DONE]"


BAD = [
    ({"prompt": "a", "max_tokens": 1000}, 400, "at most 63"),
    ({"prompt": "a " * 400, "max_tokens": None}, 400, "Shorten the prompt"),
    ({"prompt": ""}, 400, "empty"),
    ({"prompt": []}, 400, "empty"),
    ({"prompt": [1, 999_999]}, 400, "ids 0 to"),
    ({"prompt": [1, -1]}, 400, "prompt"),
    ({"prompt": [[1], []]}, 400, "no tokens"),
    ({"prompt": ["a", []]}, 400, "prompt"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature"),
    ({"prompt": "a", "temperature": "warm"}, 400, "temperature"),
    ({"prompt": "a", "top_p": 0}, 400, "top_p"),
    ({"prompt": "a", "n": 0}, 400, "n"),
    ({"prompt": "a", "n": 100}, 400, "at most 68"),
    ({"prompt": ["a"] * 23, "n": 3}, 400, "makes 69 requests"),
    ({"prompt": [[1]] * 100}, 400, "at most 68"),
    ({"prompt": [[1]] * 10_001}, 400, "at most 10000 items"),
    ({"prompt": "a", "seed": 2**63}, 400, "seed"),
    ({"prompt": "a", "stop": ""}, 400, "stop"),
    ({"prompt": "a", "max_tokens": 0}, 400, "echo"),
    ({"prompt": "a", "best_of": 4}, 400, "best_of"),
    ({"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"prompt": "a", "thinking_budget": 5}, 400, "--think-start"),
    ({"prompt": "a", "guided_json": {}}, 400, "guided_json"),
    ({"prompt": "a", "model": "gpt\x1b[31m"}, 404, "parent"),
    ({"prompt": "a" * 200_000}, 413, "bytes"),
]


def test_bad_calls_are_refused_in_openais_form(server: Server) -> None:
    head = {"authorization": "Bearer open sesame"}
    with httpx.Client(base_url=server.url, headers=head) as http:
        for change, status, words in BAD:
            answer = http.post("/v1/completions", json={"model": "parent", **change})
            assert answer.status_code == status, (change, answer.text)
            error = answer.json()["error"]
            assert words in error["message"] and set(error) == {"message", "type", "param", "code"}, (change, error)
        for messages, words in (
            ([], "messages"),
            ([{"role": "user", "content": "<|endoftext|>"}], "special token"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], "messages"),
            ([{"role": "x\n", "content": "a"}], "role"),
        ):
            answer = http.post("/v1/chat/completions", json={"model": "parent", "messages": messages})
            assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
        assert http.get("/v1/nothing").status_code == 404 and http.get("/v1/completions").status_code == 405
        assert http.get("/health").status_code == 200 and "<title>Stratum" in http.get("/").text
        for key in ("", "Bearer wrong", "Bearer open sesame2", "open"):
            answer = http.post(
                "/v1/completions", json={"model": "parent", "prompt": "a"}, headers={"authorization": key}
            )
            assert answer.status_code == 401, key
    with pytest.raises(NotFoundError, match="'parent'"):
        server.client().completions.create(model="other", prompt="a")
    assert server.idle_metrics()["stratum_requests_open"] == 0


BAD_BODIES = [
    (b"", None, "is not JSON: Expecting value at byte 0. Send one JSON object"),
    (b'{"model": "\xc3\xa9", x}', None, "at byte 16"),  # the é has two bytes
    (b"\xff\xfe", None, "byte 0 is 0xff"),
    (b'{"prompt": "\xed\xa0\x80"}', None, "byte 12 is 0xed"),
    (b"[]", None, "not a JSON object. Send one"),
    (b"null", None, "not a JSON object"),
    (b"[" * 50_000, None, "nested too deeply. Send"),
    (b'{"n": 1, "n": 2}', None, "'n' is written twice"),
    (b'{"n": ' + b"9" * 5000 + b"}", None, "4300 digits"),
    (b'{"model": NaN}', "model", "model"),
    (b'{"prompt": 1e999}', "model", "model"),
    (b'{"model": "parent", "prompt": "\\ud800"}', "prompt", "\\ud800, half of a surrogate pair"),
    (b'{"model": "parent", "prompt": ["a", "\\uDC00\\uD83D"]}', "prompt", "\\udc00, half"),
    (b'{"model": "parent", "prompt": "a", "stop": "\\ud800"}', "stop", "half of a surrogate"),
    (b'{"model": "parent", "prompt": "a", "\\ud800": 1}', "\\ud800", "half of a surrogate"),
    (json.dumps({f"field{n}": 1 for n in range(5000)}).encode(), None, "5,000 fields"),
]


def test_bodies_that_are_not_calls_say_where_and_what_to_send(server: Server) -> None:
    head = {"authorization": "Bearer open sesame", "content-type": "application/json"}
    with httpx.Client(base_url=server.url, headers=head) as http:
        for content, param, words in BAD_BODIES:
            answer = http.post("/v1/completions", content=content)
            assert answer.status_code == 400, (content[:50], answer.text)
            error = answer.json()["error"]
            assert words in error["message"] and error["param"] == param, (content[:50], error)
        for half in ("\\ud800", "a\\udfff"):
            content = b'{"model": "parent", "messages": [{"role": "user", "content": "%b"}]}' % half.encode()
            answer = http.post("/v1/chat/completions", content=content)
            assert answer.status_code == 400 and "half of a surrogate" in answer.json()["error"]["message"]
        pair = http.post("/v1/completions", content=b'{"model": "parent", "prompt": "\\ud83d\\ude00", "max_tokens": 1}')
        assert pair.status_code == 200, pair.text
        form = http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
        assert form.status_code == 400 and "content-type: application/json" in form.json()["error"]["message"]


@pytest.mark.parametrize("unit", ["[],", "{},", "1,", '{"a":1},', '[[1],"\\\\"],'])
def test_a_body_of_millions_of_values_is_refused_before_it_is_parsed(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To parse 4 MiB of empty objects took 1.9 s, in which the server answered no one."""
    monkeypatch.setattr(body, "parse_json", lambda _: pytest.fail("parsed"))
    content = '{"model": "m", "prompt": [' + unit * ((4 << 20) // len(unit)) + "1]}"
    with pytest.raises(ServerRefusal, match=r"JSON values; at most 200,000 are read"):
        body._fields(content.encode())


def test_brackets_and_commas_in_a_long_text_are_not_values() -> None:
    text = 'f(x, [1, {"a\\": "\\\\"}], "y")\n' * 60_000
    assert body._fields(json.dumps({"model": "m", "prompt": text}).encode())["prompt"] == text
    ids = list(range(150_000))
    assert body._fields(json.dumps({"model": "m", "prompt": ids}).encode())["prompt"] == ids


def test_numbers_and_flags_are_not_coerced(server: Server) -> None:
    head = {"authorization": "Bearer open sesame"}
    integers = ("max_tokens", "n", "seed", "top_k", "draft_tokens", "thinking_budget", "logprobs", "best_of")
    numbers = ("temperature", "top_p", "frequency_penalty", "presence_penalty")
    flags = ("stream", "echo", "ignore_eos", "store")
    wrong: list[tuple[str, object]] = [(name, value) for name in (*integers, *numbers) for value in (True, False, "1")]
    wrong += [(name, 1.0) for name in integers] + [(name, value) for name in flags for value in (1, 0, "true")]
    wrong += [
        ("prompt", [True]),
        ("prompt", [[1, True]]),
        ("prompt", [1, "1"]),
        ("stream_options", {"include_usage": 1}),
    ]
    with httpx.Client(base_url=server.url, headers=head) as http:
        for name, value in wrong:
            answer = http.post("/v1/completions", json={"model": "parent", "prompt": "a", "max_tokens": 1, name: value})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == name, (name, value, answer.text)
        for field in ("max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"):
            call = {"model": "parent", "messages": [{"role": "user", "content": "a"}], field: "1"}
            answer = http.post("/v1/chat/completions", json=call)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == field, (field, answer.text)
        whole = {
            "temperature": 1,
            "top_p": 1,
            "frequency_penalty": 0.0,
            "presence_penalty": 0,
            "best_of": 1,
            "top_k": 10**30,
        }
        answer = http.post("/v1/completions", json={"model": "parent", "prompt": "a", "max_tokens": 1, **whole})
        assert answer.status_code == 200, answer.text


def test_a_full_server_says_try_again_and_an_impossible_call_does_not(server: Server) -> None:
    head = {"authorization": "Bearer open sesame"}
    call = {"model": "parent", "prompt": "a", "max_tokens": 60, "ignore_eos": True}
    with httpx.Client(base_url=server.url, headers=head) as http:
        with http.stream("POST", "/v1/completions", json={**call, "n": 60, "stream": True}):
            answer = http.post("/v1/completions", json={**call, "n": 60})
            assert answer.status_code == 429 and "Try again" in answer.text
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            answer = http.post("/v1/completions", json={**call, "n": 69})
            assert answer.status_code == 400 and "at most 68" in answer.json()["error"]["message"]
    server.idle_metrics()


def test_long_prompts_do_not_stop_other_clients(folder: Path) -> None:
    """First prompts that are refused by their length in bytes, then the longest that must be encoded."""
    server = Server(folder, "--context-tokens", "60000", "--rows", "1", "--chat-template", "plain")
    waits: list[float] = []

    async def attack(text: str) -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            chat = [{"role": "user", "content": text}]
            calls = asyncio.gather(
                http.post("/v1/completions", json={"model": "parent", "prompt": text}),
                http.post("/v1/completions", json={"model": "parent", "prompt": ["a", text]}),
                http.post("/v1/chat/completions", json={"model": "parent", "messages": chat}),
            )
            while not calls.done():
                begin = time.monotonic()
                assert (await http.get("/health")).status_code == 200
                waits.append(time.monotonic() - begin)
                await asyncio.sleep(0.005)
        answers = await calls
        assert [answer.status_code for answer in answers] == [400] * 3
        errors = [answer.json()["error"] for answer in answers]
        assert {error["code"] for error in errors} == {"context_length_exceeded"}
        return [error["message"] for error in errors]

    try:
        messages = asyncio.run(attack("a " * 1_900_000))
        found = [re.search(r"has at most ([\d,]+)\. Shorten", message) for message in messages]
        most = min(int(each[1].replace(",", "")) for each in found if each is not None)
        assert None not in found and most >= 60_000
        messages = asyncio.run(attack("\u4e00" * ((most - 100) // 3)))  # a letter without a token: three tokens
        assert all(re.search(r"has [\d,]+ tokens", message) for message in messages)
    finally:
        server.process.kill()
        _, errors = server.process.communicate()
    assert max(waits) < 1 and not errors, (sorted(waits)[-5:], errors)


def test_sigterm_lets_open_requests_end(folder: Path) -> None:
    server = Server(folder, "--context-tokens", "600", "--think-start", "line", "--think-end", "again")
    call = {"model": "parent", "prompt": PROMPT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    texts = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=call, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                texts.append(json.loads(line[6:])["choices"][0])
            if len(texts) == 3:
                server.process.send_signal(signal.SIGTERM)
                texts.append(texts[-1])
    assert texts[-1]["finish_reason"] == "length"
    assert server.process.wait(60) == 0, server.process.communicate()
    server.process.communicate()


@pytest.mark.parametrize("words", [["--drain-s", "1"], []], ids=["after drain-s", "after a second Ctrl-C"])
def test_ctrl_c_ends_open_requests_with_an_error_and_prints_nothing(folder: Path, words: list[str]) -> None:
    server = Server(folder, "--context-tokens", "20000", "--chat-template", "plain", *words)
    # With logprobs each token is a line. Without them, tokens without text (the end of a document) give no line.
    call = {"model": "parent", "messages": [{"role": "user", "content": "a"}], "max_tokens": 19000, "ignore_eos": True}
    streamed = {**call, "stream": True, "logprobs": True}
    path = f"{server.url}/v1/chat/completions"
    parts: list[str] = []
    with ThreadPoolExecutor(1) as pool, httpx.stream("POST", path, json=streamed, timeout=300) as answer:
        whole = pool.submit(httpx.post, path, json=call, timeout=300)
        for line in filter(None, answer.iter_lines()):
            parts.append(line)
            if len(parts) == 5:
                while server.metrics()["stratum_requests_running"] < 2:
                    time.sleep(0.05)
                os.killpg(server.process.pid, signal.SIGINT)
                if not words:
                    with contextlib.suppress(httpx.ConnectError):  # two signals at once would arrive as one
                        while server.metrics():
                            time.sleep(0.05)
                    os.killpg(server.process.pid, signal.SIGINT)
    assert parts[-1] == "data: [DONE]" and "the server is stopping" in parts[-2], parts[-2:]
    assert whole.result().status_code == 500 and "the server is stopping" in whole.result().json()["error"]["message"]
    assert server.process.communicate(timeout=30) == ("", "") and server.process.returncode == 0


@pytest.mark.parametrize("killed", ["engine", "HTTP"])
def test_no_process_stays_when_the_other_is_killed(folder: Path, killed: str) -> None:
    server = Server(folder, "--context-tokens", "600")
    call = {"model": "parent", "prompt": PROMPT, "max_tokens": 590, "stream": True, "ignore_eos": True}
    with contextlib.suppress(httpx.TransportError):
        with httpx.stream("POST", f"{server.url}/v1/completions", json=call, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            (http,) = psutil.Process(server.process.pid).children()
            (http if killed == "HTTP" else server.process).kill()
            rest = "".join(lines)
    _, errors = server.process.communicate(timeout=60)  # ends when both processes have closed their output
    if killed == "HTTP":
        assert server.process.returncode not in (0, -signal.SIGKILL) and "HTTP process failed" in errors
    else:
        assert "the engine has stopped" in rest and rest.endswith("data: [DONE]")


def command(rank: int, folder: Path, words: list[str]) -> tuple[int, str]:
    """For `run_ranks`: the command in this process. -> exit status, what it printed."""
    os.chdir(folder)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = stratum.main(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue()


def broken(rank: int, folder: Path) -> list[tuple[int, str]]:
    """For `run_ranks`: answers of a server whose model weights are infinite in one place, and of the same one mended."""
    os.chdir(folder)
    recipe = recipe_from_mapping(parse_yaml(Path("runs/parent/recipe.yaml").read_text()))
    found = []

    async def ask(loaded: Opened) -> None:
        engine = InferenceEngine(loaded.model, recipe.model, EngineConfig(rows=4, context_tokens=CONTEXT))
        ours, theirs = multiprocessing.Pipe()
        loop = threading.Thread(target=EngineLoop(engine, ours).run)
        loop.start()
        worker = Worker(theirs, engine.stats(), most=8)
        app = build_app(
            Served("parent", loaded.tokenizer, worker, CONTEXT, None, None, 0), key=None, most_body_bytes=1000
        )
        scale = next(p for name, p in loaded.model.named_parameters() if name.endswith("mixer.D"))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
            for value in (math.inf, 1.0):
                with torch.no_grad():
                    scale.fill_(value)
                call = {"model": "parent", "prompt": PROMPT, "max_tokens": 3}
                for stream in (False, True):
                    answer = await http.post("/v1/completions", json={**call, "stream": stream})
                    found.append((answer.status_code, answer.text))
            answer = await http.post("/v1/completions", json={**call, "draft_tokens": 2})
            found.append((answer.status_code, answer.text))
            found.append(((await http.get("/health")).status_code, ""))
        await worker.stop()
        loop.join()

    with opened(recipe) as loaded:
        asyncio.run(ask(loaded))
    return found


def test_logits_that_are_not_finite_fail_the_request_and_the_server_lives(folder: Path) -> None:
    bad, bad_stream, good, good_stream, guesses, health = run_ranks(1, broken, folder)[0]
    assert bad[0] == 500 and "not finite" in bad[1]
    assert "not finite" in bad_stream[1] and bad_stream[1].endswith("data: [DONE]\n\n")
    assert good[0] == 200 and "error" not in good_stream[1] and health[0] == 200
    assert guesses[0] == 400 and "--speculate" in guesses[1]


def test_what_cannot_start_says_why(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, reason in (
            (["--port", port], f"127.0.0.1:{port}"),
            (["--port", "70000"], "--port"),
            (["--host", "no such host"], "no such host"),
            (["--key-file", "nothing.txt"], "nothing.txt"),
            (["--chat-template", "nothing.jinja"], "nothing.jinja"),
            (["--think-start", "<think>"], "--think-end"),
            (["--memory-gib", "0.000001"], "GiB"),
            (["--context-tokens", "1000000000000000"], "The longest that fits has "),
            (["--checkpoint", "runs/none"], "runs/none"),
        ):
            status, output = run_ranks(1, command, folder, ["serve", "runs/parent", "--port", "0", *words])[0]
            assert status == 2 and "Traceback" not in output and reason in output, (words, status, output)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: tests/install_chromium.sh")
def test_the_page_continues_texts_and_chats_in_a_browser(server: Server, tmp_path: Path) -> None:
    text = (
        server.client()
        .completions.create(model="parent", prompt=PROMPT, max_tokens=20, temperature=0.0)
        .choices[0]
        .text
    )

    async def use() -> None:
        async with open_page(server.url) as page:
            await page.wait_for("document.readyState == 'complete' && !$('keys').hidden")  # it asks for the key
            await page.evaluate("$('key').value = 'open sesame'; load()")
            await page.wait_for("$('model').textContent == 'parent'")
            await page.evaluate(f"$('prompt').value = {PROMPT!r}; $('temperature').value = 0; $('tokens').value = 20")
            await page.evaluate("$('form').requestSubmit()")
            await page.wait_for("$('note').textContent && !running")
            assert await page.evaluate("$('text').textContent") == PROMPT + text
            assert "20 tokens" in await page.evaluate("$('note').textContent")
            await page.evaluate(
                "$('mode').value = 'chat'; $('mode').onchange(); $('prompt').value = '<img src=x onerror=alert(1)>'"
            )
            await page.evaluate("$('tokens').value = 5; $('form').requestSubmit()")
            await page.wait_for("!running && $('text').textContent")
            assert await page.evaluate("messages.length") == 2, await page.evaluate("$('text').textContent")
            assert await page.evaluate("$('text').querySelector('img')") is None  # text stays text
            await page.evaluate("$('tokens').value = 100000; $('prompt').value = 'x'; $('form').requestSubmit()")
            await page.wait_for("$('text').querySelector('.error') && !running && messages.length == 2")
            assert "at most" in await page.evaluate("$('text').querySelector('.error').textContent")
            for name, width, dark in (("wide", 1000, False), ("phone", 380, True)):
                await page.look(width=width, height=700, dark=dark)
                assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
                await page.screenshot(tmp_path / f"{name}.png")
            assert not page.errors

    asyncio.run(use())
