"""Compare our model with transformers' implementation, block by block, on the same tokens.

    ours, theirs, tokens --> Agreement: a row per block, logits, logits with our caches; the first block that drifts

Each block of ours is measured twice. *Alone*: it gets the input of their block, so the error is its own. The measure is
the difference between what the two add to the residual stream, divided by the norm of what theirs adds. *So far*: each
model runs from the tokens on its own states, so errors of earlier blocks are included. A block drifts if its own error
exceeds the tolerance plus an allowance for rounding, which matters if a block adds little to a large residual stream.
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.schema.errors import BackendError, CheckpointError
from recipes.schema.foreign import printable
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import layer_kinds
from train.hf.config import NO_CLAMP, family_of, for_transformers, is_reward_model, read_config
from train.hf.mapping import layer_name
from train.inference.batch_engine import EngineConfig, InferenceEngine
from train.inference.forward import logits_in_parts
from train.inference.request import Request, Sampling

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest relative error, by the format that both models compute in."""

_ROUNDINGS = 32
"""Roundings of the residual stream allowed in a block's error, in addition to the tolerance."""


@dataclass(frozen=True)
class Row:
    """The comparison at one place in the model."""

    theirs: str
    ours: str
    alone: float
    """Relative error of our block on the input of theirs."""
    limit: float
    """Upper limit of `alone`."""
    error: float
    """Relative error of the output, including earlier blocks."""
    cosine: float
    """Cosine of the outputs, including earlier blocks."""

    @property
    def drifts(self) -> bool:
        """Whether the error exceeds the limit. NaN counts as drift."""
        return not self.alone <= self.limit


@dataclass(frozen=True)
class Agreement:
    """The result of a comparison."""

    rows: list[Row]
    tokens: int
    tolerance: float
    dtype: str
    logits_worst: float
    """Largest difference of a logit, divided by the largest logit."""
    same_choice: float
    """Share of positions with the same most likely token."""
    cached_worst: float
    """`logits_worst` of our logits with caches, computed token by token along the same text."""
    generated: int
    """Tokens generated greedily by both. Information only: rounding alone can change the choice between two likely tokens."""
    generated_same: int
    """How many of them agree before the first difference."""
    is_reward: bool = False
    """Of a reward model: logits are the rewards of every token, and there are no caches and no text to compare."""

    @property
    def first_drift(self) -> Row | None:
        """The first place that drifts."""
        return next((row for row in self.rows if row.drifts), None)

    @property
    def problems(self) -> list[str]:
        """Why the two models disagree; empty if they agree."""
        found = []
        if (row := self.first_drift) is not None:
            others = sum(other.drifts for other in self.rows) - 1
            more = f" ({others} more do)" if others else ""
            found.append(
                f"{row.theirs} (ours: {row.ours}) is the first that drifts{more}: relative error {row.alone:.2g} on the "
                f"same input, {row.limit:.1g} allowed."
            )
        if not self.logits_worst <= self.tolerance:
            found.append(f"logits differ by {self.logits_worst:.2g} of the largest, {self.tolerance:.0e} allowed.")
        if not self.cached_worst <= self.tolerance:
            found.append(
                f"logits of our caches, token by token, differ by {self.cached_worst:.2g} of the largest, "
                f"{self.tolerance:.0e} allowed."
            )
        return found

    def table(self) -> list[str]:
        """The comparison as lines of a Markdown table."""
        lines = ["| place | ours | alone | so far | cosine | |", "|---|---|---|---|---|---|"]
        first = self.first_drift
        for row in self.rows:
            mark = ("**first that drifts**" if row is first else "drifts") if row.drifts else ""
            lines.append(
                f"| {row.theirs} | {row.ours} | {row.alone:.1e} | {row.error:.1e} | {row.cosine:.8f} | {mark} |"
            )
        return lines

    def summary(self) -> list[str]:
        """The results that are not in the table, one per line."""
        if self.is_reward:
            return [
                f"{self.tokens:,} tokens of text in {self.dtype}: rewards of every token within {self.logits_worst:.1e} of the "
                f"largest, {self.tolerance:.0e} allowed."
            ]
        return [
            f"{self.tokens:,} tokens of text in {self.dtype}: logits within {self.logits_worst:.1e} of the largest, "
            f"{self.tolerance:.0e} allowed; the same most likely token at {100 * self.same_choice:.2f} % of the positions.",
            f"Token by token through our caches, as in generation: logits within {self.cached_worst:.1e} of the largest. "
            f"Greedy continuation: {self.generated_same} of {self.generated} tokens the same (information only).",
        ]


def load_theirs(folder: Path, *, dtype: torch.dtype, device: torch.device, open_clamp: bool = False) -> Any:
    """transformers' model of a directory; no code of the directory is run. BackendError if the package is missing.

    open_clamp: let transformers' Nemotron-H use dt below `time_step_min`, as in its training. Inputs of linear layers are not
    rounded (`w8a8` formats): one code that rounds the other way changes all that follow, and no two implementations agree to
    more than a tenth of the rounding itself. CheckpointError if weights are missing or unexpected.
    """
    transformers = _transformers()
    with quiet():
        try:
            plain = read_config(folder)
            config = transformers.AutoConfig.for_model(**for_transformers(plain))
            if open_clamp and hasattr(config, "time_step_min"):
                config.time_step_min = NO_CLAMP
            kind = transformers.AutoModelForCausalLM
            if is_reward_model(plain):
                kind, config.num_labels = transformers.AutoModelForSequenceClassification, 1
            model, loading = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # its classes raise errors of every kind for a bad config
            raise CheckpointError(f"transformers cannot load {folder}: {_shown(error)}") from error
    problems = [
        f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, loading[kind]))[:8])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if loading.get(kind)
    ]
    if problems:
        raise CheckpointError(f"transformers cannot load all weights of {folder}: {'; '.join(problems)}.")
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:  # of compressed-tensors
            scheme.input_activations = None
    return model.eval().to(device)


def their_ids(folder: Path, texts: Sequence[str], *, with_special: bool) -> list[list[int]]:
    """Token ids of texts by transformers' tokenizer of a directory. with_special: include the tokens its template adds, as in
    a plain call `tokenizer(text)`. CheckpointError if it cannot be read."""
    transformers = _transformers()
    with quiet():
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            return [tokenizer(text, add_special_tokens=with_special)["input_ids"] for text in texts]
        except Exception as error:  # its classes raise errors of every kind for a bad file
            raise CheckpointError(f"transformers cannot read the tokenizer of {folder}: {_shown(error)}") from error


def _shown(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}", most=500)


@torch.no_grad()
def compare(
    ours: Any,
    theirs: Any,
    tokens_BS: torch.Tensor,
    *,
    model: ModelConfig,
    tolerance: float | None = None,
    continue_tokens: int = 20,
) -> Agreement:
    """Run both models on the same tokens and compare every block and the logits, of whole rows and with our caches.

    ours: the whole model on this rank, in eval mode. tolerance: None takes the default of the format.
    """
    with quiet():
        return _compare(ours, theirs, tokens_BS, model, tolerance, continue_tokens)


def _compare(
    ours: Any,
    theirs: Any,
    tokens_BS: torch.Tensor,
    model: ModelConfig,
    tolerance: float | None,
    continue_tokens: int,
) -> Agreement:
    family, kinds = family_of(model), layer_kinds(model.pattern)
    dtype = next(ours.parameters()).dtype
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    base = theirs.model
    layers, blocks = list(ours.decoder.layers), list(base.layers)
    final = getattr(base, "norm_f", None) or base.norm
    with _traced([*layers, ours.decoder.final_norm]) as our_calls:
        our_logits = ours(tokens_BS, positions, None).float()
    is_reward = model.head == "scalar"
    with _traced([*blocks, final]) as their_calls:
        if is_reward:  # its forward pass scores the last token only
            their_logits = theirs.score(base(tokens_BS, use_cache=False).last_hidden_state).float()
            our_logits = our_logits[..., None]
        else:
            their_logits = theirs(tokens_BS, use_cache=False).logits.float()
    our_logits = our_logits[..., : their_logits.shape[-1]]

    rows = []
    first_ours, first_theirs = our_calls[0].input.transpose(0, 1), their_calls[0].input
    error = _relative(first_ours, first_theirs)
    rows.append(Row("embedding", "embedding", error, tolerance, error, _cosine(first_ours, first_theirs)))
    per_block = len(layers) // len(blocks)
    assert per_block * len(blocks) == len(layers), f"{len(layers)} layers of ours, {len(blocks)} blocks of theirs"
    for index, call in enumerate(their_calls[:-1]):
        members = range(index * per_block, (index + 1) * per_block)
        hidden = call.input.transpose(0, 1).contiguous()
        for member in members:
            hidden = our_calls[member].rerun(hidden)
        added = call.output - call.input
        size, stream = _norm(added), _norm(call.output)
        rounding = _ROUNDINGS * torch.finfo(dtype).eps * stream / size if size else 0.0
        output = our_calls[members[-1]].output.transpose(0, 1)
        rows.append(
            Row(
                theirs=layer_name(family, members[0]),
                ours="layer " + " and ".join(f"{member} `{kinds[member]}`" for member in members),
                alone=_norm(hidden.transpose(0, 1) - call.output) / size if size else math.inf,
                limit=tolerance + rounding,
                error=_relative(output, call.output),
                cosine=_cosine(output, call.output),
            )
        )
    last, their_last = our_calls[-1], their_calls[-1]
    normed = last.rerun(their_last.input.transpose(0, 1).contiguous()).transpose(0, 1)
    output = last.output.transpose(0, 1)
    rows.append(
        Row(
            theirs="final norm",
            ours="final norm",
            alone=_relative(normed, their_last.output),
            limit=tolerance,
            error=_relative(output, their_last.output),
            cosine=_cosine(output, their_last.output),
        )
    )
    error = _relative(our_logits, their_logits)
    head_alone = (
        error if not any(row.drifts for row in rows) else 0.0
    )  # its input differs already: do not blame the head
    rows.append(Row("logits", "logits", head_alone, tolerance, error, _cosine(our_logits, their_logits)))
    prompt = min(32, tokens_BS.shape[1])
    text_S = tokens_BS[0, : prompt + continue_tokens]
    if is_reward:
        continue_tokens = 0
    return Agreement(
        rows=rows,
        tokens=tokens_BS.numel(),
        tolerance=tolerance,
        dtype=str(dtype).removeprefix("torch."),
        logits_worst=float((our_logits - their_logits).abs().max() / their_logits.abs().max()),
        same_choice=float((our_logits.argmax(-1) == their_logits.argmax(-1)).float().mean()),
        cached_worst=0.0 if is_reward else _cached_error(ours, text_S, their_logits[0], prompt, model),
        generated=continue_tokens,
        generated_same=0 if is_reward else _greedy_same(ours, theirs, text_S[:prompt], continue_tokens, model),
        is_reward=is_reward,
    )


def _cached_error(
    ours: Any, tokens_S: torch.Tensor, their_logits_SV: torch.Tensor, prompt: int, model: ModelConfig
) -> float:
    """Run our model with caches along a text: the first `prompt` tokens at once, then one at a time. -> largest difference of
    a logit from theirs, divided by the largest logit."""
    cuts = [prompt] + [1] * (len(tokens_S) - prompt)
    logits_SV = logits_in_parts(ours, tokens_S.tolist(), cuts, shape=model)[prompt - 1 :, : their_logits_SV.shape[-1]]
    return float((logits_SV - their_logits_SV[prompt - 1 : len(tokens_S)]).abs().max() / their_logits_SV.abs().max())


def _greedy_same(ours: Any, theirs: Any, prompt_S: torch.Tensor, count: int, model: ModelConfig) -> int:
    """Number of greedy tokens after a prompt that agree before the first difference.

    End-of-text tokens get no special treatment: transformers' `generate` would forbid them or stop, so it is not used.
    """
    tokens = prompt_S
    for _ in range(count):
        tokens = torch.cat([tokens, theirs(tokens[None], use_cache=False).logits[0, -1:].argmax(-1)])
    engine = InferenceEngine(ours, model, EngineConfig(rows=1, context_tokens=len(tokens)))
    events = engine.run([Request(prompt_S.tolist(), count, sampling=Sampling(temperature=0.0))])[0]
    our_ids = [event.token.id for event in events if event.token is not None]
    pairs = enumerate(zip(our_ids, tokens[len(prompt_S) :].tolist(), strict=True))
    return next((place for place, (a, b) in pairs if a != b), count)


@dataclass
class _Call:
    """One recorded call of a module: input, output and the other arguments."""

    module: Any
    input: torch.Tensor
    output: torch.Tensor
    arguments: dict[str, Any]
    is_named: bool

    def rerun(self, hidden: torch.Tensor) -> torch.Tensor:
        """Call the module again with another input and the same other arguments."""
        if self.is_named:
            return _first(self.module(hidden_states=hidden, **self.arguments))
        return _first(self.module(hidden, **self.arguments))


@contextmanager
def _traced(modules: list[Any]) -> Iterator[list[_Call]]:
    """Record the calls of modules, in the order they finish."""
    calls: list[_Call] = []

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        is_named = "hidden_states" in kwargs
        hidden = kwargs["hidden_states"] if is_named else args[0]
        calls.append(_Call(module, hidden.detach(), _first(output).detach(), rest, is_named))

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _norm(x: torch.Tensor) -> float:
    return float(x.double().norm())


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    size = _norm(theirs)
    return _norm(ours.double() - theirs.double()) / size if size else math.inf


def _cosine(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    a, b = ours.double().flatten(), theirs.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def wrong_scan() -> str | None:
    """A note if the installed transformers computes Nemotron-H wrongly; None otherwise."""
    version = tuple(int(part) for part in _transformers().__version__.split(".")[:2])
    if not (5, 6) <= version <= (5, 13):
        return None
    return (
        f"transformers {_transformers().__version__} computes Nemotron-H wrongly beyond one chunk of the scan (versions 5.6 to "
        f"5.13, without mamba-ssm's kernels): install 5.14 or later."
    )


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise BackendError(
            "comparing with transformers needs the package: pip install -e '.[hf]' (import and export do not)."
        ) from error
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block, transformers shows no warnings and no progress bars. Errors are still raised."""
    logging = _transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # compressed-tensors shows progress bars
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
