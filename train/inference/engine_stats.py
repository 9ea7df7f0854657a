"""Counts of an engine, for its users: the server's metrics, the reports of generation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and the current numbers of texts and free pages."""

    running: int
    waiting: int
    prompt_tokens: int
    """Prompt tokens of admitted texts. A text that had to wait again adds all tokens that it reads again."""
    cached_tokens: int
    """Those that were found in the prefix cache, or that another text with the same prompt had just read."""
    generated_tokens: int
    preemptions: int
    steps: int
    free_pages: dict[str, int]
    """By kind of attention layer."""
    prefix_blocks: int
    draws: int = 0
    """Times that a text got tokens from a step."""
    guessed_tokens: int = 0
    """Guesses of a drafter that were checked."""
    accepted_tokens: int = 0
    """Those that became tokens."""

    @property
    def acceptance_rate(self) -> float:
        """Share of the guesses that became tokens."""
        return self.accepted_tokens / self.guessed_tokens if self.guessed_tokens else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a text gets in a step in which it gets any; 1 without speculation."""
        return self.generated_tokens / self.draws if self.draws else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were found in the prefix cache and not read."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
