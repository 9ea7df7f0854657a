"""Runs the inference engine in a separate thread.

    submit(requests) --calls--> add, step, step, ... --events of a step, at once--> Ticket.events

Only the engine's thread uses the engine. All other code here runs in asyncio's thread.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from train.inference.batch_engine import EngineStats, InferenceEngine
from train.inference.request import Event, Request


class Busy(Exception):
    """Too many requests are open; the client should try again later."""


class EngineStopped(Exception):
    """The engine has stopped; the message says why."""


@dataclass(eq=False)
class Ticket:
    """The requests of one client's call."""

    requests: tuple[Request, ...]
    accepted: asyncio.Future[None]
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    ids: tuple[int, ...] = ()
    """The engine's ids, one for each request; known once `accepted` is done."""


class Worker:
    """Starts the engine's thread; `stop` ends it. most: largest number of requests that run or wait at once."""

    def __init__(self, engine: InferenceEngine, *, most: int) -> None:
        self._engine = engine
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[Ticket | tuple[int, ...] | None] = queue.SimpleQueue()
        """A ticket: add its requests. Ids: cancel them. None: end the thread when the engine is idle."""
        self._tickets: dict[int, Ticket] = {}
        """By request id. Used only by the engine's thread."""
        self._stopping = False
        self._stats = engine.stats()
        self.open_requests = 0
        """Requests accepted and not released yet."""
        self.ended: asyncio.Future[BaseException | None] = self._loop.create_future()
        """Done when the thread has ended; its result is the error that ended it, if any."""
        self._thread = threading.Thread(target=self._run, name="inference engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> EngineStats:
        """Counts of the engine after its last step."""
        return self._stats

    async def submit(self, requests: Sequence[Request]) -> Ticket:
        """Give requests to the engine. The caller must `release` the ticket.

        Raises Busy if too many are open, EngineStopped, and RecipeError for a request that the engine refuses.
        """
        if self.ended.done():
            raise EngineStopped(f"the engine has stopped: {self.ended.result()}")
        if self.open_requests + len(requests) > self._most:
            raise Busy(f"{self.open_requests} requests are open; the server takes {self._most}. Try again later.")
        ticket = Ticket(tuple(requests), self._loop.create_future())
        self.open_requests += len(requests)
        self._calls.put(ticket)
        try:
            await asyncio.shield(ticket.accepted)
        except BaseException:  # also when the client has gone
            self.release(ticket)
            raise
        return ticket

    def release(self, ticket: Ticket) -> None:
        """End the ticket's requests that still run, and free their memory: the client needs nothing more."""
        self.open_requests -= len(ticket.requests)
        if ticket.accepted.done() and not ticket.accepted.cancelled():
            ticket.accepted.exception()  # mark it as retrieved, or asyncio logs it
            self._calls.put(ticket.ids)
        else:  # The engine's thread has not added it yet, so its ids are not known.
            ticket.accepted.add_done_callback(lambda _: self._calls.put(ticket.ids))

    def cancel(self, id: int) -> None:
        """End one request of a ticket."""
        self._calls.put((id,))

    async def stop(self) -> BaseException | None:
        """End the thread after the open requests. -> the error that ended it, if any."""
        self._calls.put(None)
        return await self.ended

    # ---- the engine's thread

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while self._take_calls():
                self._hand_out(self._engine.step())
        except BaseException as caught:  # a fault of the engine: no client may wait for ever
            error = caught
        events = [Event(id, finish="error", message="the engine has stopped") for id in list(self._tickets)]
        with contextlib.suppress(RuntimeError):  # the event loop is closed already
            self._hand_out(events)
            self._loop.call_soon_threadsafe(self._end, error)

    def _take_calls(self) -> bool:
        """Carry out the calls in the queue; if the engine is idle, wait for one. -> whether to continue."""
        while True:
            if self._engine.is_idle:
                if self._stopping:
                    return False
                call = self._calls.get()
            else:
                try:
                    call = self._calls.get_nowait()
                except queue.Empty:
                    return True
            match call:
                case None:
                    self._stopping = True
                case Ticket():
                    self._add(call)
                case ids:
                    for id in ids:
                        self._engine.cancel(id)

    def _add(self, ticket: Ticket) -> None:
        ids: list[int] = []
        refusal: Exception | None = None
        try:
            for request in ticket.requests:
                ids.append(self._engine.add(request))
        except Exception as error:
            refusal = error
        ticket.ids = tuple(ids)
        self._tickets |= dict.fromkeys(ids, ticket)
        self._loop.call_soon_threadsafe(_accept, ticket, refusal)

    def _hand_out(self, events: list[Event]) -> None:
        pairs = [(self._tickets[event.request], event) for event in events]
        for event in events:
            if event.finish is not None:
                del self._tickets[event.request]
        self._stats = self._engine.stats()
        if pairs:
            self._loop.call_soon_threadsafe(_deliver, pairs)

    def _end(self, error: BaseException | None) -> None:
        """Runs in asyncio's thread: report the end, and refuse the calls that are still in the queue."""
        self.ended.set_result(error)
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                return
            if isinstance(call, Ticket):
                _accept(call, EngineStopped("the engine has stopped"))


def _accept(ticket: Ticket, refusal: Exception | None) -> None:
    if refusal is None:
        ticket.accepted.set_result(None)
    else:
        ticket.accepted.set_exception(refusal)


def _deliver(pairs: list[tuple[Ticket, Event]]) -> None:
    for ticket, event in pairs:
        ticket.events.put_nowait(event)
