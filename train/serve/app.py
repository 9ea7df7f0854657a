"""The HTTP side: OpenAI's completions and chat completions, the list of models, health, metrics and a page to try it.

Every error has OpenAI's form (refusal.py). A client that goes away ends its requests.
"""

import asyncio
import hmac
import json
import secrets
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from data.chat.template import ChatTemplate
from data.tokenizer import Tokenizer
from recipes.schema.errors import StratumError
from train.inference.request import Request, Sampling, Thinking, Token
from train.serve.answer import Answer, Piece
from train.serve.body import LimitedBodies, read_call
from train.serve.metrics import Metrics
from train.serve.prompt_ids import PromptEncoder, too_long
from train.serve.refusal import ServerRefusal, error_body
from train.serve.schema import ChatCall, CompletionCall
from train.serve.worker import Busy, EngineStopped, Ticket, Worker


@dataclass(frozen=True)
class Served:
    """The model that is served, with everything an answer needs."""

    name: str
    tokenizer: Tokenizer
    worker: Worker
    context_tokens: int
    template: ChatTemplate | None
    thinking: Thinking | None
    """Markers of thinking; their budget is replaced by each call's. None if the model has no markers."""
    created: int
    """Unix time, seconds."""
    speculates: bool = False
    """Whether the engine has a drafter."""
    placeholders: tuple[str, ...] = ()
    """Special tokens that stand for media in the training of this model."""


def build_app(served: Served, *, key: str | None, most_body_bytes: int) -> ASGIApp:
    """The ASGI application. key: clients must send it as a bearer token, if given."""
    app = FastAPI(title="Stratum", openapi_url=None, docs_url=None, redoc_url=None)
    metrics = Metrics(served.worker)
    encoder = PromptEncoder(served.tokenizer, served.template, served.context_tokens, placeholders=served.placeholders)

    @app.exception_handler(ServerRefusal)
    async def refusal(_request: HttpRequest, error: ServerRefusal) -> JSONResponse:
        return JSONResponse(error.body, error.status_code, headers=error.headers)

    @app.exception_handler(StarletteError)
    async def other_refusal(_request: HttpRequest, error: StarletteError) -> JSONResponse:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, headers=error.headers)

    @app.exception_handler(StratumError)
    async def refused(_request: HttpRequest, error: StratumError) -> JSONResponse:
        return JSONResponse(error_body(400, str(error)), 400)

    @app.exception_handler(ClientDisconnect)
    async def gone(_request: HttpRequest, _error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Busy)
    async def busy(_request: HttpRequest, error: Busy) -> JSONResponse:
        body = error_body(429, str(error), code="server_busy")
        return JSONResponse(body, 429, headers={"Retry-After": str(metrics.retry_s())})

    @app.exception_handler(Exception)
    async def failed(_request: HttpRequest, _error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, "the server failed on this call; its log says why."), 500)

    @app.exception_handler(EngineStopped)
    async def stopped(_request: HttpRequest, error: EngineStopped) -> JSONResponse:
        return JSONResponse(error_body(503, str(error)), 503)

    def check_key(request: HttpRequest) -> None:
        if key is None:
            return
        sent = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not hmac.compare_digest(sent, key.encode()):
            raise ServerRefusal(401, "the API key is missing or wrong.", code="invalid_api_key")

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=503 if served.worker.ended.done() else 200)

    @app.get("/metrics")
    async def metrics_page() -> Response:
        content, kind = metrics.page()
        return Response(content, media_type=kind)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return resources.files("train.serve").joinpath("page.html").read_text()

    @app.get("/v1/models")
    async def models(request: HttpRequest) -> dict[str, Any]:
        check_key(request)
        return {"object": "list", "data": [_model(served)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: HttpRequest) -> dict[str, Any]:
        check_key(request)
        _check_model(served, name)
        return _model(served)

    @app.post("/v1/completions")
    async def completions(request: HttpRequest) -> Response:
        begin = time.monotonic()
        check_key(request)
        call = await read_call(request, CompletionCall)
        _check_model(served, call.model)
        if not call.prompt:
            raise ServerRefusal(400, "prompt is empty. Give a text, or token ids.", param="prompt")
        prompts = _prompts(call.prompt)
        _check_count(served, len(prompts), call.n)
        job = _Completion(served, call, await encoder.prompts(prompts))
        return await _respond(request, job, metrics, begin)

    @app.post("/v1/chat/completions")
    async def chat(request: HttpRequest) -> Response:
        begin = time.monotonic()
        check_key(request)
        call = await read_call(request, ChatCall)
        _check_model(served, call.model)
        _check_count(served, 1, call.n)
        messages = [{"role": message.role, "content": message.text} for message in call.messages]
        job = _Chat(served, call, [await encoder.chat(messages)])
        return await _respond(request, job, metrics, begin)

    return LimitedBodies(app, most_body_bytes)


class _Job(ABC):
    """One call of the API: the requests it makes, and its answer as JSON."""

    kind: str
    """The field `object` of a whole answer."""
    part_kind: str
    """The field `object` of a part of a stream."""
    prefix: str
    prompt_field: str
    """Name of the call's field with the prompt."""

    def __init__(self, served: Served, call: CompletionCall | ChatCall, prompts: list[list[int]]) -> None:
        self.served, self.call, self.prompts = served, call, prompts
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.stop_strings = call.stop_strings
        self.stop = frozenset({served.tokenizer.eod})

    def requests(self) -> list[Request]:
        """One for each choice. The i-th choice of a prompt has the seed `seed + i`."""
        call = self.call
        seed = secrets.randbits(62) if call.seed is None else call.seed
        stop = frozenset() if call.ignore_eos else self.stop
        thinking = None
        if call.thinking_budget is not None:
            if self.served.thinking is None:
                raise ServerRefusal(
                    400,
                    "thinking_budget: this server has no thinking markers. Start it with --think-start and --think-end.",
                    param="thinking_budget",
                )
            thinking = replace(self.served.thinking, budget=call.thinking_budget)
        if call.draft_tokens and not self.served.speculates:
            raise ServerRefusal(
                400, "draft_tokens: this server makes no guesses. Start it with --speculate.", param="draft_tokens"
            )
        return [
            Request(
                prompt,
                self.new_tokens(prompt),
                sampling=Sampling(call.temperature, top_k=call.top_k, top_p=call.top_p, seed=seed + index),
                stop=stop,
                top_logprobs=self.top_logprobs,
                score_from=self.score_from(prompt),
                thinking=thinking,
                draft_tokens=call.draft_tokens,
            )
            for prompt in self.prompts
            for index in range(call.n)
        ]

    def room(self, prompt: list[int]) -> int:
        """The largest number of tokens that an answer to this prompt may have."""
        room = self.served.context_tokens - len(prompt)
        if room < 1:
            raise too_long(len(prompt), self.served.context_tokens, param=self.prompt_field)
        return room

    # The two kinds of call differ in these:
    top_logprobs: int
    wants_logprobs: bool

    @abstractmethod
    def new_tokens(self, prompt: list[int]) -> int:
        """How many tokens to generate at most for a prompt."""

    def score_from(self, prompt: list[int]) -> int | None:
        return None

    @abstractmethod
    def choice(self, index: int, piece: Piece, scores: tuple[Token, ...], *, is_part: bool) -> dict[str, Any]:
        """One choice of the answer, or of a part of its stream, as JSON."""

    def first_parts(self) -> list[dict[str, Any]]:
        """The choices of the first part of a stream."""
        return []

    # Both kinds share these:

    def body(self, choices: list[dict[str, Any]], *, is_part: bool, usage: dict[str, Any] | None) -> dict[str, Any]:
        body = {
            "id": self.id,
            "object": self.part_kind if is_part else self.kind,
            "created": self.created,
            "model": self.served.name,
            "choices": choices,
        }
        return body if usage is None else {**body, "usage": usage}

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        read, generated = sum(map(len, self.prompts)), sum(answer.generated for answer in answers)
        right, guesses = sum(answer.accepted for answer in answers), sum(answer.guesses for answer in answers)
        return {
            "prompt_tokens": read,
            "completion_tokens": generated,
            "total_tokens": read + generated,
            "completion_tokens_details": {
                "accepted_prediction_tokens": right,
                "rejected_prediction_tokens": guesses - right,
            },
        }


class _Completion(_Job):
    kind = part_kind = "text_completion"
    prefix = "cmpl"
    prompt_field = "prompt"

    def __init__(self, served: Served, call: CompletionCall, prompts: list[list[int]]) -> None:
        super().__init__(served, call, prompts)
        self.echo = call.echo
        self.most = call.max_tokens
        self.wants_logprobs = call.logprobs is not None
        self.top_logprobs = call.logprobs or 0
        self._offsets = [0] * (len(prompts) * call.n)
        self._echoed: set[int] = set()
        if self.most == 0 and not self.echo:
            raise ServerRefusal(400, "max_tokens=0 gives nothing. Use 1 or more, or echo=true.", param="max_tokens")

    def new_tokens(self, prompt: list[int]) -> int:
        return min(self.room(prompt), 16) if self.most is None else self.most

    def score_from(self, prompt: list[int]) -> int | None:
        scores = self.echo and (self.wants_logprobs or self.most == 0)
        return 1 if scores and (len(prompt) > 1 or self.most == 0) else None

    def choice(self, index: int, piece: Piece, scores: tuple[Token, ...], *, is_part: bool) -> dict[str, Any]:
        text, found = piece.text, piece.tokens
        prompt = self.prompts[index // self.call.n]
        decode = self.served.tokenizer.decode
        echoed = self.echo and index not in self._echoed  # only in the first part of a choice
        if echoed:
            self._echoed.add(index)
            text = decode(prompt) + text
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": piece.finish}
        if self.wants_logprobs:
            lines = [(token.id, token.logprob, token.top) for token in (*scores, *found)]
            first = [(prompt[0], None, ())] if echoed else []
            names, values, tops, offsets = [], [], [], []
            for id, logprob, top in [*first, *lines]:
                name = _token_text(self.served.tokenizer, id)
                names.append(name)
                values.append(logprob)
                tops.append({_token_text(self.served.tokenizer, other): value for other, value in top} or None)
                offsets.append(self._offsets[index])
                self._offsets[index] += len(name)
            choice["logprobs"] = {
                "tokens": names,
                "token_logprobs": values,
                "top_logprobs": tops,
                "text_offset": offsets,
            }
        return choice


def _prompts(given: str | list[int] | list[str] | list[list[int]]) -> Sequence[str | list[int]]:
    """The prompts of a call: one, or several in a list."""
    if isinstance(given, str):
        return [given]
    numbers = [entry for entry in given if isinstance(entry, int)]
    return [numbers] if numbers else [entry for entry in given if not isinstance(entry, int)]


class _Chat(_Job):
    kind = "chat.completion"
    part_kind = "chat.completion.chunk"
    prefix = "chatcmpl"
    prompt_field = "messages"

    def __init__(self, served: Served, call: ChatCall, prompts: list[list[int]]) -> None:
        super().__init__(served, call, prompts)
        assert served.template is not None, "PromptEncoder refuses a chat without one"
        self.stop_strings += served.template.stop_strings
        self.stop |= served.template.stop_ids
        self.most = call.max_completion_tokens or call.max_tokens
        self.wants_logprobs = call.logprobs
        self.top_logprobs = (call.top_logprobs or 0) if call.logprobs else 0

    def new_tokens(self, prompt: list[int]) -> int:
        return self.most or self.room(prompt)

    def first_parts(self) -> list[dict[str, Any]]:
        return [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for index in range(self.call.n)
        ]

    def choice(self, index: int, piece: Piece, scores: tuple[Token, ...], *, is_part: bool) -> dict[str, Any]:
        content = {"content": piece.text}
        body = {"delta": content if piece.text else {}} if is_part else {"message": {"role": "assistant", **content}}
        logprobs = None
        if self.wants_logprobs:
            logprobs = {
                "content": [
                    {
                        **_token_entry(self.served.tokenizer, token.id, token.logprob),
                        "top_logprobs": [_token_entry(self.served.tokenizer, *other) for other in token.top],
                    }
                    for token in piece.tokens
                ]
            }
        return {"index": index, **body, "logprobs": logprobs, "finish_reason": piece.finish}


async def _respond(http: HttpRequest, job: _Job, metrics: Metrics, begin: float) -> Response:
    """The whole answer, or a stream of server-sent events. begin: when the call came (time.monotonic)."""
    ticket = await job.served.worker.submit(job.requests())
    if job.call.stream:
        return StreamingResponse(_stream(job, ticket, metrics, begin), media_type="text/event-stream")
    collecting = asyncio.create_task(_collect(job, ticket, metrics, begin))
    leaving = asyncio.create_task(_client_gone(http))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # the client has disconnected
        return JSONResponse(collecting.result())
    finally:
        collecting.cancel()
        leaving.cancel()
        job.served.worker.release(ticket)


async def _client_gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


@dataclass(eq=False)
class _ScoredPiece:
    """A piece of one choice, and the scores of prompt tokens that arrived before it."""

    index: int
    piece: Piece
    scores: tuple[Token, ...]


async def _pieces(
    job: _Job, ticket: Ticket, answers: list[Answer], metrics: Metrics, begin: float
) -> AsyncGenerator[list[_ScoredPiece]]:
    """Pieces of all choices, until all have ended; together those that are ready together. Raises ServerRefusal if one failed."""
    open_choices = set(range(len(answers)))
    scores: list[list[Token]] = [[] for _ in answers]
    is_first = True
    while open_choices:
        ready: list[_ScoredPiece] = []
        failed = ""
        for index, event in await ticket.take():
            if index not in open_choices:
                continue
            if event.finish == "error":
                failed = event.message
                break
            scores[index] += event.scores
            piece = answers[index].piece(event)
            if piece is None:
                continue
            if is_first and piece.tokens:
                metrics.first_token(time.monotonic() - begin)
                is_first = False
            if piece.finish is not None:
                open_choices.discard(index)
                if event.finish is None:  # a stop string ended it, which the engine does not know
                    job.served.worker.cancel(ticket, index)
            ready.append(_ScoredPiece(index, piece, tuple(scores[index])))
            scores[index] = []
        if ready:
            yield ready
        if failed:
            raise ServerRefusal(500, f"the request failed: {failed}.", code="generation_failed")
    metrics.request_done(time.monotonic() - begin)


def _answers(job: _Job, ticket: Ticket) -> list[Answer]:
    return [Answer(job.served.tokenizer, job.stop_strings) for _ in ticket.requests]


async def _collect(job: _Job, ticket: Ticket, metrics: Metrics, begin: float) -> dict[str, Any]:
    answers = _answers(job, ticket)
    found: list[list[_ScoredPiece]] = [[] for _ in answers]
    async for parts in _pieces(job, ticket, answers, metrics, begin):
        for part in parts:
            found[part.index].append(part)
    choices = [job.choice(index, *_joined(parts), is_part=False) for index, parts in enumerate(found)]
    return job.body(choices, is_part=False, usage=job.usage(answers))


def _joined(parts: list[_ScoredPiece]) -> tuple[Piece, tuple[Token, ...]]:
    text = "".join(part.piece.text for part in parts)
    tokens = tuple(token for part in parts for token in part.piece.tokens)
    return Piece(text, tokens, parts[-1].piece.finish), tuple(score for part in parts for score in part.scores)


async def _stream(job: _Job, ticket: Ticket, metrics: Metrics, begin: float) -> AsyncIterator[bytes]:
    """Server-sent events; those that are ready together are one write. Starlette closes the generator when the client
    disconnects, which releases the requests."""
    try:
        answers = _answers(job, ticket)
        wants_usage = job.call.stream_options is not None and job.call.stream_options.include_usage
        first = job.first_parts()
        if first:
            yield _sse(job.body(first, is_part=True, usage=None))
        async with aclosing(_pieces(job, ticket, answers, metrics, begin)) as pieces:
            async for parts in pieces:
                ready = b"".join(
                    _sse(
                        job.body(
                            [job.choice(part.index, part.piece, part.scores, is_part=True)], is_part=True, usage=None
                        )
                    )
                    for part in parts
                    if part.piece.text or part.piece.finish or job.wants_logprobs or part.scores
                )
                if ready:
                    yield ready
        if wants_usage:
            yield _sse(job.body([], is_part=True, usage=job.usage(answers)))
    except ServerRefusal as error:
        yield _sse(error.body)
    finally:
        job.served.worker.release(ticket)
    yield b"data: [DONE]\n\n"


_as_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""json.dumps would make such an encoder for each event."""


def _sse(body: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % _as_json(body).encode()


def _model(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "stratum",
        "max_model_len": served.context_tokens,
    }


def _check_model(served: Served, name: str) -> None:
    if name != served.name:
        message = f"this server has no model {name[:200]!r}; it has {served.name!r}."
        raise ServerRefusal(404, message, param="model", code="model_not_found")


def _check_count(served: Served, prompts: int, choices: int) -> None:
    """Before a prompt is encoded. ServerRefusal for more requests than ever fit; Busy if they do not fit now."""
    count, most = prompts * choices, served.worker.most
    if count > most:
        raise ServerRefusal(
            400,
            f"n={choices} for {prompts:,} prompt{'s' if prompts > 1 else ''} makes {count:,} requests; this server takes at most "
            f"{most:,} at once. Use fewer, or start the server with a larger --queue.",
            param="n" if choices > 1 else "prompt",
        )
    served.worker.check_room(count)


def _token_text(tokenizer: Tokenizer, id: int) -> str:
    """A token as text; the name of a special one; `bytes:\\xe2` for a part of a character, as OpenAI writes it."""
    content = tokenizer.bytes_of(id)
    if not content:
        return tokenizer.special_name(id) or ""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _token_entry(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    return {"token": _token_text(tokenizer, id), "logprob": logprob, "bytes": list(tokenizer.bytes_of(id))}
