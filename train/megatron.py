"""Prepares and imports Megatron-Core: importing this module makes `megatron.core` usable, with or without a GPU.

Each package that imports Megatron imports this module in its `__init__`, so that it always runs first. In `train/checkpoint`,
whose offline commands start without Megatron, and in `train/engine.py` the files that import Megatron do it.

Megatron uses `torch.cuda` in about 280 places: as a device for new tensors, for streams and events, and for the random
state. On a machine with a GPU nothing is redirected. Without one, exactly the names that Megatron's training path uses are
redirected to CPU equivalents, once per process and before `megatron.core` is imported; the rest of this project needs no
such distinction.

What is redirected, and why:

    torch.cuda.current_device()      the CPU device: Megatron passes it as `device=` everywhere
    device="cuda" in factories       the CPU device: optimizer, clipping and the schedules create scalars with it
    Tensor.cuda, Module.cuda         identity
    Tensor.type()                    the CUDA name: the distributed optimizer sorts parameters by that string
    streams and events               objects that do nothing: CPU work is synchronous
    CUDA random state                the CPU generator's
    malloc                           keeps freed memory: giving back the pages of activation-sized tensors and faulting them
                                     in again makes memory-bound operations up to 4x slower (docs/log.md)
    torch.compile                    not applied while `megatron.core` is imported (saves seconds of start-up; its fused
                                     functions are not on the CPU path)
"""

import contextlib
import ctypes
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch.utils import _device

from recipes.schema.errors import BackendError, refuse
from recipes.schema.rules import device_problems

DeviceKind = Literal["auto", "cpu", "cuda"]

_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "empty_like", "zeros_like")
"""torch functions that Megatron calls with device="cuda"."""


class _InertStream:
    """Replaces `torch.cuda.Stream` and `torch.cuda.Event`: on a CPU, work is complete when the call returns."""

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def wait_stream(self, *_args: object) -> None: ...

    def wait_event(self, *_args: object) -> None: ...

    def record(self, *_args: object) -> None: ...

    def record_event(self, *_args: object) -> "_InertStream":
        return self

    def wait(self, *_args: object) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, *_args: object) -> float:
        return 0.0


def choose_device(kind: DeviceKind) -> torch.device:
    """The device of this process: with `auto`, its own GPU (by LOCAL_RANK) if there is one, else the CPU.

    Raises BackendError if `cuda` is configured and there is no GPU.
    """
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    refuse(device_problems(kind, has_gpu=torch.cuda.is_available()), BackendError)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def use_device(device: torch.device) -> None:
    """Make Megatron create its tensors, streams and random state on `device`. Call it before `open_mesh`.

    On a GPU machine `run.device=cpu` redirects `torch.cuda` here; on a machine without a GPU the import did it already.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif not getattr(torch.cuda.current_device, "is_redirected", False):
        _redirect_to_cpu()
        _redirect_tracker()


def _redirect_to_cpu() -> None:
    _keep_freed_memory()
    _redirect_devices(torch.device("cpu"))
    _redirect_streams()
    _redirect_random_state()


def _quieten() -> None:
    """Silence the messages that Megatron and torch print at every start: none of them is useful to the user of a recipe."""
    for module in (r"megatron\.", r"torch\.distributed\.(c10d_logger|checkpoint)"):
        warnings.filterwarnings("ignore", module=module)
    for name in ("megatron.core", "torch.utils.cpp_extension", "torch.distributed.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _keep_freed_memory() -> None:
    """Tell glibc to serve large blocks from its heap and never to trim it (mallopt(3)); other C libraries: no change."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, -1)


def _redirect_devices(cpu: torch.device) -> None:
    def current_device() -> torch.device:
        return cpu

    current_device.is_redirected = True  # type: ignore[attr-defined]
    torch.cuda.current_device = current_device  # type: ignore[assignment]
    torch.cuda.set_device = lambda _device: None
    torch.cuda.synchronize = lambda *_args: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.is_current_stream_capturing = lambda: False

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device")
            if device is not None and (isinstance(device, int) or str(device).startswith("cuda")):
                kwargs["device"] = cpu
            return factory(*args, **kwargs)

        return make

    # torch trap: `with torch.device("meta")` recognises factories by identity, in a cached list. Fill the cache before
    # the factories are replaced.
    _device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))

    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]
    type_of = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = type_of(self, *args, **kwargs)
        if not isinstance(name, str) or name.startswith("torch.cuda."):
            return name
        return name.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = cuda_type  # type: ignore[method-assign]


def _redirect_streams() -> None:
    stream = _InertStream()
    torch.cuda.Stream = torch.cuda.Event = _InertStream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_args: stream  # type: ignore[assignment]
    torch.cuda.set_stream = lambda _stream: None
    torch.cuda.stream = lambda _stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    torch.Tensor.record_stream = lambda self, _stream: None  # type: ignore[method-assign]


def _redirect_random_state() -> None:
    torch.cuda.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]


def _redirect_tracker() -> None:
    """Make Megatron's random-state tracker use the CPU generator."""
    from megatron.core.tensor_parallel import random  # importable only after the redirection

    random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)

    @contextlib.contextmanager
    def fork(tracker: Any, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draw from the named state, then restore the old one (Megatron's own fork warns if the CPU state changed)."""
        if name not in tracker.states_:
            raise RuntimeError(f"random state {name!r} was never seeded: build the mesh before the model")
        outer = torch.get_rng_state()
        torch.set_rng_state(tracker.states_[name])
        try:
            yield
        finally:
            tracker.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)

    random.CudaRNGStatesTracker.fork = fork


def _import_megatron(*, is_compiling: bool) -> None:
    """Import the parts of Megatron-Core that training uses.

    Without a GPU `torch.compile` is disabled during the import: the CPU path uses no fused functions (saves seconds). `wandb`
    is hidden: Megatron always imports it, and its two temporary folders remain if the process is killed.
    """
    compiler = torch.compile

    def uncompiled(function: Any = None, *_args: Any, **_kwargs: Any) -> Any:
        return function if function is not None else (lambda inner: inner)

    if not is_compiling:
        torch.compile = uncompiled  # type: ignore[assignment]
    is_hidden = "wandb" not in sys.modules
    if is_hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron warns that Apex and Transformer Engine are missing
            # Imports here, not at the top: they must run after the redirection and with torch.compile disabled.
            import megatron.core.dist_checkpointing
            import megatron.core.models.hybrid.hybrid_model  # likewise
            import megatron.core.optimizer  # likewise
            import megatron.core.pipeline_parallel  # noqa: F401  likewise
    finally:
        torch.compile = compiler
        if is_hidden:
            del sys.modules["wandb"]


_quieten()
if torch.cuda.is_available():
    _import_megatron(is_compiling=True)
else:
    _redirect_to_cpu()
    _import_megatron(is_compiling=False)
    _redirect_tracker()
