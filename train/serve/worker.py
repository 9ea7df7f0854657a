"""The HTTP side's view of the engine, which runs in another process (`engine_loop.py`).

    submit(requests) --Add--> pipe --> engine --> pipe --all events of a step, one message--> Ticket.take

All code here runs in asyncio's thread, except the writing to the pipe: it may have to wait for the engine's current step.
"""

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from recipes.schema.errors import RecipeError
from train.inference.engine_stats import EngineStats
from train.inference.request import Event, Request
from train.serve.engine_loop import Accepted, Add, Call, Cancel, Ended, Message, Step


class Busy(Exception):
    """Too many requests are open; the client should try again later."""


class EngineStopped(Exception):
    """The engine has stopped; the message says why."""


@dataclass(eq=False)
class Ticket:
    """The requests of one client's call."""

    number: int
    requests: tuple[Request, ...]
    accepted: asyncio.Future[None]
    _events: list[tuple[int, Event]] = field(default_factory=list)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, index: int, event: Event) -> None:
        self._events.append((index, event))
        self._arrived.set()

    async def take(self) -> list[tuple[int, Event]]:
        """All events that have come since the last call, each with the index of its request; waits for one."""
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return events


class Worker:
    """Gives requests to the engine at the other end of `pipe`. most: largest number of requests that run or wait at once."""

    def __init__(self, pipe: Connection, stats: EngineStats, *, most: int) -> None:
        self._pipe, self._stats = pipe, stats
        self.most = most
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._numbers = itertools.count()
        self._closed: str | None = None
        """Why no more requests are taken."""
        self.open_requests = 0
        """Requests accepted and not released yet."""
        self.ended: asyncio.Future[str | None] = self._loop.create_future()
        """Done when the engine has ended; its result is the error that ended it, if any."""
        self._loop.add_reader(pipe.fileno(), self._read)
        threading.Thread(target=self._write, name="calls to the engine", daemon=True).start()

    @property
    def stats(self) -> EngineStats:
        """Counts of the engine after its last step."""
        return self._stats

    def check_room(self, count: int) -> None:
        """Raises Busy if `count` more requests would be too many now, and EngineStopped."""
        if self.ended.done():
            raise EngineStopped(f"the engine has stopped: {self.ended.result()}")
        if self._closed is not None:
            raise EngineStopped(self._closed)
        if self.open_requests + count > self.most:
            raise Busy(f"{self.open_requests} requests are open; the server takes {self.most}. Try again later.")

    async def submit(self, requests: Sequence[Request]) -> Ticket:
        """Give requests to the engine. The caller must `release` the ticket.

        Raises Busy if too many are open, EngineStopped, and RecipeError for a request that the engine refuses.
        """
        self.check_room(len(requests))
        ticket = Ticket(next(self._numbers), tuple(requests), self._loop.create_future())
        self._tickets[ticket.number] = ticket
        self.open_requests += len(requests)
        self._calls.put(Add(ticket.number, ticket.requests))
        try:
            await ticket.accepted
        except BaseException:  # also when the client has gone
            self.release(ticket)
            raise
        return ticket

    def release(self, ticket: Ticket) -> None:
        """End the ticket's requests that still run, and free their memory: the client needs nothing more."""
        self.open_requests -= len(ticket.requests)
        del self._tickets[ticket.number]
        self._calls.put(Cancel(ticket.number))

    def cancel(self, ticket: Ticket, index: int) -> None:
        """End one request of a ticket."""
        self._calls.put(Cancel(ticket.number, index))

    async def stop(self) -> str | None:
        """End the engine after the open requests. -> the error that ended it, if any."""
        self._calls.put(None)
        return await self.ended

    def _write(self) -> None:
        """Runs in a thread of its own."""
        with contextlib.suppress(OSError):  # the engine has ended; `_read` reports it
            while True:
                self._pipe.send(self._calls.get())

    def _read(self) -> None:
        try:
            message: Message = self._pipe.recv()
        except (EOFError, OSError):
            message = Ended("its process has gone")
        match message:
            case Step(events, stats):
                self._stats = stats
                for number, index, event in events:
                    if number in self._tickets:
                        self._tickets[number].put(index, event)
            case Accepted(number, refusal):
                if number in self._tickets:
                    _accept(self._tickets[number], None if refusal is None else RecipeError(refusal))
            case Ended(error):
                self._end(error)

    def _end(self, error: str | None) -> None:
        """No client may wait for ever: end all open requests, and refuse those that the engine has not seen."""
        self._loop.remove_reader(self._pipe.fileno())
        self.ended.set_result(error)
        self.end_open("the engine has stopped")

    def end_open(self, reason: str) -> None:
        """End all open requests with an error, and refuse later ones with EngineStopped."""
        self._closed = reason
        for ticket in self._tickets.values():
            _accept(ticket, EngineStopped(reason))
            for index in range(len(ticket.requests)):
                ticket.put(index, Event(index, finish="error", message=reason))


def _accept(ticket: Ticket, refusal: Exception | None) -> None:
    if ticket.accepted.done():  # the client has gone
        return
    if refusal is None:
        ticket.accepted.set_result(None)
    else:
        ticket.accepted.set_exception(refusal)
