"""The engine's side of the server: runs the engine for the calls that come through a pipe, and sends its events back.

    Add, Cancel, None --> [EngineLoop: add, cancel, step, step, ...] --> Accepted, Step, Ended

The HTTP side (`worker.py`) runs in a separate process, so that it does not share the engine's interpreter lock. One message
carries all events of a step.
"""

import contextlib
import pickle
from multiprocessing.connection import Connection
from typing import NamedTuple

from recipes.schema.errors import RecipeError
from train.inference.batch_engine import InferenceEngine
from train.inference.engine_stats import EngineStats
from train.inference.request import Event, Request


class Add(NamedTuple):
    """Start the requests of a ticket. The HTTP side numbers the tickets."""

    ticket: int
    requests: tuple[Request, ...]


class Cancel(NamedTuple):
    """End a request of a ticket. Without `choice`, its index: end all of them; the HTTP side has forgotten the ticket."""

    ticket: int
    choice: int | None = None


Call = Add | Cancel | None
"""None: end when all requests have ended."""


class Accepted(NamedTuple):
    """The engine has taken all requests of a ticket; or not, for this reason."""

    ticket: int
    refusal: str | None


class Step(NamedTuple):
    """What one step of the engine gave."""

    events: list[tuple[int, int, Event]]
    """(ticket, index of the request in the ticket, event)."""
    stats: EngineStats


class Ended(NamedTuple):
    """The last message. error: what ended the engine, if it failed."""

    error: str | None


Message = Accepted | Step | Ended


class EngineLoop:
    """Runs an engine until the HTTP side asks for the end or has gone."""

    def __init__(self, engine: InferenceEngine, pipe: Connection) -> None:
        self._engine, self._pipe = engine, pipe
        self._places: dict[int, tuple[int, int]] = {}
        """(ticket, index) of the open requests, by the engine's id."""
        self._ids: dict[int, list[int]] = {}
        """The engine's ids by ticket."""
        self._stopping = False

    def run(self) -> None:
        """Raises what the engine raises, after the HTTP side has been told."""
        error: str | None = None
        try:
            with contextlib.suppress(EOFError, ConnectionError):  # the HTTP side has gone
                while self._take_calls():
                    self._hand_out(self._engine.step())
        except BaseException as fault:
            error = repr(fault)
            raise
        finally:
            with contextlib.suppress(ConnectionError):
                self._send(Ended(error))
            self._pipe.close()

    def _take_calls(self) -> bool:
        """Carry out the calls that have come; if the engine is idle, wait for one. -> whether to continue."""
        while True:
            if self._engine.is_idle:
                if self._stopping:
                    return False
            elif not self._pipe.poll():
                return True
            call: Call = self._pipe.recv()
            match call:
                case None:
                    self._stopping = True
                case Add():
                    self._add(call)
                case Cancel(ticket, choice):
                    for id in self._ids.pop(ticket) if choice is None else [self._ids[ticket][choice]]:
                        self._engine.cancel(id)

    def _add(self, call: Add) -> None:
        ids = self._ids[call.ticket] = []
        refusal: str | None = None
        try:
            for index, request in enumerate(call.requests):
                ids.append(self._engine.add(request))
                self._places[ids[-1]] = call.ticket, index
        except RecipeError as error:
            refusal = str(error)
        self._send(Accepted(call.ticket, refusal))

    def _hand_out(self, events: list[Event]) -> None:
        placed = [(*self._places[event.request], event) for event in events]
        for event in events:
            if event.finish is not None:
                del self._places[event.request]
        self._send(Step(placed, self._engine.stats()))

    def _send(self, message: Message) -> None:
        # Connection.send pickles with a Python class: 166 us for a step of 16 texts instead of 48.
        self._pipe.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
