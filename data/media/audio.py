"""Audio: bytes -> 16 kHz mono -> log-mel frames, as Whisper's (arXiv 2212.04356).

    bytes --open_audio--> float32 [samples] at 16 kHz --log_mel--> float32 [frames, mels], a frame each 10 ms

Equal to transformers' `WhisperFeatureExtractor` on the same samples. A clip keeps its own length: nothing is padded to 30
seconds. A bad clip is a ValueError that says why, as the rest of a sentence about it.
"""

import functools
import io

import numpy as np

from data.system.optional_package import optional_package

RATE = 16_000
_WINDOW, _HOP = 400, 160
"""25 ms and 10 ms (Whisper)."""
_RATES = (4_000, 384_000)
"""Rates that are resampled. Headers may name any number."""
_MOST_CHANNELS = 64
_FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "RF64", "W64")
_UNKNOWN_SIZE = 0x7FFF_0000
"""Sizes from here on are what programs write that do not know the size."""
_ZEROS = 16
"""Zero crossings of the resampling filter on each side."""
_ROLLOFF = 0.95
"""Its cut-off, as a fraction of the lower Nyquist frequency."""
_MOST_PHASES = 1024
_BLOCK = 8192
"""Samples resampled, and frames transformed, at a time: bounds the memory."""


def open_audio(content: bytes, *, most_seconds: float) -> np.ndarray:
    """The clip as float32 [samples] at 16 kHz, the mean of its channels. ValueError says why it cannot be used."""
    with optional_package("soundfile", extra="media"):
        import soundfile  # optional
    _check_end(content)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as opened:
            if opened.format not in _FORMATS:
                raise ValueError(f"has the format {opened.format}; known are {', '.join(_FORMATS)}")
            rate, frames, channels = opened.samplerate, opened.frames, opened.channels
            if not _RATES[0] <= rate <= _RATES[1]:
                raise ValueError(f"has a sample rate of {rate:,} Hz, outside of {_RATES[0]:,} to {_RATES[1]:,}")
            if not 1 <= channels <= _MOST_CHANNELS:
                raise ValueError(f"has {channels:,} channels, more than {_MOST_CHANNELS}")
            if frames > most_seconds * rate:
                raise ValueError(f"is {frames / rate:,.1f} s long, more than data.media.audio_seconds={most_seconds:g}")
            # One more than the header says, so that a wrong header cannot fill the memory.
            samples = opened.read(min(frames, int(most_seconds * rate)) + 1, dtype="float32", always_2d=True)
    except ValueError:
        raise
    except Exception as error:  # LibsndfileError, and errors of its Python binding
        why = str(getattr(error, "error_string", error)).rstrip(".")
        if "SF_INFO" in why:
            why = "its header has an impossible sample rate, such as 0 Hz, or no channels"
        raise ValueError(f"cannot be decoded as audio: {why}") from error
    if len(samples) != frames:
        raise ValueError(f"ends after {len(samples):,} of its {frames:,} samples: it is truncated")
    if not np.isfinite(samples).all():
        raise ValueError("has samples that are NaN or infinite")
    mono = resampled(samples.mean(axis=1), rate)
    if len(mono) < _WINDOW:
        raise ValueError(f"has {len(samples):,} samples at {rate:,} Hz: less than one window of 25 ms")
    return mono


def _check_end(content: bytes) -> None:
    """ValueError for a WAV or Ogg file that ends too early: libsndfile would give what is there. (Streams write no real size.)"""
    if content[:4] == b"OggS" and not content[content.rfind(b"OggS") + 5 : content.rfind(b"OggS") + 6] >= b"\x04":
        raise ValueError("has no last page: it is truncated")
    size = int.from_bytes(content[4:8], "little")
    if content[:4] == b"RIFF" and len(content) < size + 8 < _UNKNOWN_SIZE:
        raise ValueError(f"has {len(content):,} of its {size + 8:,} bytes: it is truncated")


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """float32 [samples at 16 kHz]: band-limited interpolation (a sinc under a Hann window, as J. O. Smith describes it)."""
    if rate == RATE:
        return samples.astype(np.float32)
    common = int(np.gcd(rate, RATE))
    up, down = RATE // common, rate // common
    cut = _ROLLOFF * min(1.0, RATE / rate)  # in units of the input's Nyquist frequency
    reach = int(np.ceil(_ZEROS / cut))
    taps = np.arange(-reach + 1, reach + 1)

    def filter_of(phases: np.ndarray) -> np.ndarray:
        away = taps[None, :] - phases[:, None] / up
        window = np.where(np.abs(away) < reach, np.cos(np.pi / 2 * away / reach) ** 2, 0.0)
        weights = cut * np.sinc(cut * away) * window
        return weights / weights.sum(axis=1, keepdims=True)  # a constant stays what it is

    table = filter_of(np.arange(up)) if up <= _MOST_PHASES else None
    count = -(-len(samples) * up // down)
    padded = np.pad(samples.astype(np.float64), (reach - 1, reach + 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(taps))
    out = np.empty(count, dtype=np.float32)
    for first in range(0, count, _BLOCK):
        place = np.arange(first, min(first + _BLOCK, count)) * down
        phases = place % up
        weights = filter_of(phases) if table is None else table[phases]
        out[first : first + _BLOCK] = np.einsum("nt,nt->n", windows[place // up], weights)
    return out


def frames_of(samples: int) -> int:
    """Number of log-mel frames of a clip."""
    return samples // _HOP


def log_mel(samples: np.ndarray, *, mels: int) -> np.ndarray:
    """float32 [frames, mels] of float32 [samples] at 16 kHz."""
    padded = np.pad(samples.astype(np.float64), _WINDOW // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP][: frames_of(len(samples))]
    hann = np.hanning(_WINDOW + 1)[:-1]
    filters = _mel_filters(mels)
    logs = np.empty((len(windows), mels))
    for first in range(0, len(windows), _BLOCK):
        power = np.abs(np.fft.rfft(windows[first : first + _BLOCK] * hann)) ** 2
        logs[first : first + _BLOCK] = np.log10(np.maximum(power @ filters, 1e-10))
    return ((np.maximum(logs, logs.max() - 8.0) + 4.0) / 4.0).astype(np.float32)


@functools.cache
def _mel_filters(mels: int) -> np.ndarray:
    """float64 [201, mels]: triangles of equal area, evenly spaced on Slaney's scale (linear below 1 kHz, then logarithmic)."""
    step = 27 / np.log(6.4)
    top = 15 + np.log(8000 / 1000) * step
    marks = np.linspace(0, top, mels + 2)
    hertz = np.where(marks < 15, marks * 200 / 3, 1000 * np.exp(np.maximum(marks - 15, 0) / step))
    bins = np.linspace(0, RATE / 2, _WINDOW // 2 + 1)[:, None]
    rising = (bins - hertz[:-2]) / (hertz[1:-1] - hertz[:-2])
    falling = (hertz[2:] - bins) / (hertz[2:] - hertz[1:-1])
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (hertz[2:] - hertz[:-2])
