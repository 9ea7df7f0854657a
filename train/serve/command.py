"""`stratum serve`: serve a run's model through OpenAI's API."""

import contextlib
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig

from data.system.imports import collector_paused
from recipes.schema.command import dotted_keys, run_tool
from recipes.schema.errors import USER_ERRORS, RecipeError
from recipes.schema.foreign import read_bounded_text
from recipes.schema.options import CommandParser
from recipes.schema.read import read_recipe
from recipes.schema.recipe import Recipe
from recipes.schema.tools import ServeConfig

_EXAMPLES = """
stratum serve runs/smoke                                   http://127.0.0.1:8000, with a page to try it
stratum serve smoke --port 0 --context-tokens 256          a free port; texts of at most 256 tokens
stratum serve runs/smoke --chat-template plain             chat completions too
"""
_NOTES = """
With a server running:
  curl -s localhost:8000/v1/completions -H 'content-type: application/json' \\
    -d '{"model": "smoke", "prompt": "ROMEO.", "max_tokens": 40}'
"""


def main(arguments: Sequence[str]) -> int:
    """Entry point of `stratum serve`. Ends with status 0 after SIGTERM or SIGINT, when all open requests are answered."""
    about = "Answer calls of OpenAI's API (completions, chat completions) with the newest checkpoint of a run."
    parser = CommandParser("serve", about=about, examples=_EXAMPLES, notes=_NOTES, recipe=True)
    return run_tool(parser, arguments, ServeConfig, _serve, keys=dotted_keys(Recipe), user_errors=USER_ERRORS)


def _serve(config: ServeConfig, composed: DictConfig) -> int:
    recipe = read_recipe(composed)
    key = _key(config.key_file)
    try:
        with collector_paused():
            # fastapi and uvicorn are an extra; torch takes seconds to import, and the errors above are reported before it.
            from train.serve.server import serve
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"the server needs the package {error.name}. Install the extra: pip install 'stratum-pretrain[serve]'."
        ) from error
    with _listening(config.host, config.port) as listener:
        return serve(recipe, config, listener, key=key)


def _key(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        key = read_bounded_text(Path(file)).strip()
    except (OSError, ValueError) as error:
        raise RecipeError(f"--key-file {file}: {error}.") from error
    if not key or not key.isascii() or not key.isprintable():
        raise RecipeError(f"--key-file {file}: the key must be one line of printable ASCII characters.")
    return key


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket, before the model is loaded: a port in use is reported at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"cannot listen on {host}:{port}: {error}. Choose another --host or --port.") from error
    with listener:
        yield listener
