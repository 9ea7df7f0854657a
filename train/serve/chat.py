"""Turns the messages of a chat into token ids with a Jinja template, the format of Hugging Face's tokenizers.

Special tokens come from the template only. A message that contains the text of one is refused: otherwise its author could
end the message and write the next speaker's part.
"""

import re
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.tokenizer import Tokenizer
from recipes.schema.errors import RecipeError
from recipes.schema.foreign import printable, read_bounded_text

PLAIN = """\
{%- for message in messages %}{{ message.role | capitalize }}: {{ message.content }}

{% endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""
"""For models without a template, which were not trained on chats."""
PLAIN_STOPS = ("\n\nUser:", "\n\nSystem:")


class ChatTemplate:
    """A compiled template. Raises RecipeError if it is not valid Jinja."""

    def __init__(self, source: str, tokenizer: Tokenizer, *, stop_strings: tuple[str, ...] = ()) -> None:
        self.stop_strings = stop_strings
        self._tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise RecipeError(f"the chat template is not valid: {printable(str(error))}.") from error

    def ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat, up to the start of the model's answer. Raises RecipeError."""
        special = self._tokenizer.special
        for message in messages:
            for name in special:
                if name and name in message["content"]:
                    raise RecipeError(f"a message contains {name!r}, a special token of this model. Remove it.")
        names = {id: name for name, id in special.items()}
        end, begin = names[self._tokenizer.eod], names.get(self._tokenizer.bod, "")  # type: ignore[arg-type]
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, bos_token=begin, eos_token=end, tools=None
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise RecipeError(f"the chat template refuses these messages: {printable(str(error))}.") from error
        ids: list[int] = []
        parts = re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text)
        for index, part in enumerate(parts):
            ids += [special[part]] if index % 2 else self._tokenizer.encode(part)
        begins = self._tokenizer.bod is None or ids[:1] == [self._tokenizer.bod]
        return ids if begins else [self._tokenizer.bod, *ids]  # type: ignore[list-item]


def open_template(place: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a file, or the built-in template `plain`."""
    if place == "plain":
        return ChatTemplate(PLAIN, tokenizer, stop_strings=PLAIN_STOPS)
    try:
        source = read_bounded_text(Path(place))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--chat-template {place}: {error}. Name a Jinja file, or `plain`.") from error
    return ChatTemplate(source, tokenizer)


def _refuse(message: str) -> None:
    raise TemplateError(message)
