"""An answer to be judged."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recipes.schema.errors import DataError


@dataclass(frozen=True)
class Sample:
    """A prompt, the model's answer, and what the verifier needs to know (JSON values)."""

    prompt: str
    answer: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def fact(self, name: str, kind: type | tuple[type, ...] = str) -> Any:
        """A fact of the given type. DataError if the record does not have it."""
        value = self.facts.get(name)
        if not isinstance(value, kind):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise DataError(f"the record's {name!r} is {type(value).__name__}, not {names}")
        return value
