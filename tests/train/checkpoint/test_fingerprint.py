"""Fingerprints: exact integer arithmetic as written in the module's formula, any cut of a tensor, every kind of change."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.schema.errors import CheckpointError
from train.checkpoint import fingerprint
from train.checkpoint.files import boxes_of_range, bytes_of, opened
from train.checkpoint.fingerprint import Sums

MASK = 2**64 - 1
DTYPES = (
    torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64,
)  # fmt: skip


def mix(x: int) -> int:
    """splitmix64 (Steele, Lea, Flood 2014) on Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def by_formula(values: torch.Tensor) -> Sums:
    """The module's formula, term by term; NaN and infinity as torch itself finds them."""
    width = values.element_size()
    rows = values.reshape(-1, values.shape[-1])
    raw = rows.contiguous().view(torch.uint8).reshape(len(rows), -1).tolist()
    word = min(width, 4)
    sums = [0, 0]
    for r, row in enumerate(raw):
        for c in range(len(row) // word):
            bits = int.from_bytes(bytes(row[c * word : (c + 1) * word]), "little")
            for lane in range(2):
                rho = mix(~(2 * r + lane) & MASK) | 1
                alpha = (mix(2 * c + lane) >> 32) | 1
                sums[lane] += rho * alpha * bits
    sick = int((~values.double().isfinite()).sum()) if values.is_floating_point() else 0
    return Sums(sums[0] & MASK, sums[1] & MASK, sick)


def whole(values: torch.Tensor) -> Sums:
    return fingerprint.of_box(values, whole=values.shape, offset=[0] * values.dim(), shape=values.shape)


def random_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=g)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (5, 9), (3, 1, 4), (2, 3, 17)])
def test_both_forms_are_the_formula(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = random_of(shape, dtype)
    want = by_formula(values)
    assert whole(values) == want
    monkeypatch.setenv("STRATUM_NATIVE", "0")
    fingerprint.kernels.cache_clear()
    assert fingerprint.kernels() is None and whole(values) == want
    fingerprint.kernels.cache_clear()


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    cuts=st.lists(st.integers(0, 729), max_size=5),
)
def test_any_cut_gives_the_same_value(shape: tuple[int, ...], dtype: torch.dtype, cuts: list[int]) -> None:
    """Ranges of the flattened tensor, as the distributed optimizer divides it; each range as boxes; summed in any order."""
    values = random_of(shape, dtype)
    size = values.numel()
    edges = sorted({0, size, *(cut % (size + 1) for cut in cuts)})
    total, covered = fingerprint.ZERO, 0
    for start, end in reversed(list(pairwise(edges))):
        for offset, box, first in boxes_of_range(shape, start, end):
            count = math.prod(box)
            data = values.reshape(-1)[first : first + count]
            where = tuple(slice(o, o + n) for o, n in zip(offset, box, strict=True))
            assert values[where].numel() == count and torch.equal(
                values[where].reshape(-1).view(torch.uint8), data.view(torch.uint8)
            )
            total = fingerprint.add(total, fingerprint.of_box(data, whole=shape, offset=offset, shape=box))
            covered += count
    assert covered == size and total == whole(values)


@settings(max_examples=60)
@given(data=st.data())
def test_every_small_change_shows(data: st.DataObject) -> None:
    values = random_of(
        (6, 11), data.draw(st.sampled_from((torch.float32, torch.bfloat16))), data.draw(st.integers(0, 99))
    )
    bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)
    before = whole(values)
    match data.draw(st.sampled_from(("bit", "swap", "rows", "columns", "shift"))):
        case "bit":
            at, bit = data.draw(st.integers(0, 65)), data.draw(st.integers(0, 8 * values.element_size() - 1))
            flat = bits.reshape(-1)
            flat[at] ^= torch.tensor(1, dtype=bits.dtype) << bit
        case "swap":
            i, j = data.draw(st.integers(0, 64)), 65
            flat = bits.reshape(-1)
            flat[[i, j]] = flat[[j, i]]
        case "rows":
            bits[[0, 3]] = bits[[3, 0]]
        case "columns":
            bits[:, [2, 7]] = bits[:, [7, 2]]
        case "shift":
            bits.copy_(bits.roll(1, 0))
    changed = not torch.equal(values.view(torch.uint8), random_of_like(values, before))
    assert (whole(values) != before) == changed


def random_of_like(values: torch.Tensor, before: Sums) -> torch.Tensor:
    """The original tensor: the one of a hundred candidates with this fingerprint."""
    for seed in range(100):
        original = random_of((6, 11), values.dtype, seed)
        if whole(original) == before:
            return original.view(torch.uint8)
    raise AssertionError("no original has this fingerprint")


def test_the_same_pass_copies_the_bytes() -> None:
    values = random_of((300, 70), torch.float32)
    out = torch.zeros_like(values)
    sums = fingerprint.of_box(values, whole=(300, 70), offset=(0, 0), shape=(300, 70), copy_to=out.data_ptr())
    assert sums == whole(values) and torch.equal(out.view(torch.uint8), values.view(torch.uint8))


BOXES = [
    ((9, 3000), (2, 700), (7, 1023)),  # within a block of columns
    ((9, 3000), (0, 0), (3, 2049)),  # blocks and one column
    ((9000, 40), (11, 3), (8900, 37)),  # several tiles of narrow rows
    ((700, 5000), (1, 5), (600, 1300)),  # tiles and blocks
    ((9, 70_000), (1, 5), (7, 69_990)),  # more blocks than coefficients are kept of
    ((5, 6, 7, 30), (1, 2, 3, 4), (3, 4, 2, 26)),  # rows that lie apart
    ((200_001,), (77,), (199_000,)),  # one long row
]


@pytest.mark.skipif(fingerprint.kernels() is None, reason="no C compiler here: the plain form is all there is")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("whole", "offset", "shape"), BOXES)
def test_large_boxes_in_memory_and_in_a_file(
    whole: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Compiled: in memory, with a copy, and from a file with a small and a large buffer."""
    box = {"whole": whole, "offset": offset, "shape": shape}
    data = random_of(shape, dtype)
    want = fingerprint._in_torch(data, **box)  # proven by the formula above
    copy = torch.zeros_like(data)
    assert fingerprint.of_box(data, **box) == fingerprint.of_box(data, **box, copy_to=copy.data_ptr()) == want
    assert torch.equal(copy.view(torch.uint8), data.view(torch.uint8))
    path = tmp_path / "f"
    path.write_bytes(b"header!" + bytes_of(data).tobytes())
    with path.open("rb") as stream:
        for room in (1000, 4096, 1 << 20):
            scratch = torch.empty(room, dtype=torch.uint8)
            found = fingerprint.of_stored_box(stream.fileno(), 7, dtype=dtype, **box, scratch=scratch)
            assert found == want, room
        with pytest.raises(OSError, match="ends too early"):
            fingerprint.of_stored_box(stream.fileno(), 8, dtype=dtype, **box, scratch=scratch)
    with pytest.raises(CheckpointError, match="Is a directory"), opened(tmp_path) as handle:
        fingerprint.of_stored_box(handle, 0, dtype=dtype, **box, scratch=scratch)


def test_sums_over_ranks_wrap_like_the_formula() -> None:
    parts = [Sums(2**64 - 1, 2**63, 1), Sums(5, 2**63 + 7), Sums(0, 1, 2)]
    tensor = sum(fingerprint.to_tensor([part]) for part in parts)
    assert isinstance(tensor, torch.Tensor)
    assert fingerprint.from_tensor(tensor) == [Sums(4, 8, 3)]
    assert fingerprint.from_text(fingerprint.text(Sums(4, 8, 3))) == Sums(4, 8)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.is_floating_point], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (5, 1500), (700, 64)])
def test_each_nan_and_infinity_is_counted_wherever_it_is(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The largest finite number and the smallest ones are not; first and last element, and some between, of both signs."""
    limits = torch.finfo(dtype)
    data = torch.full(shape, limits.max, dtype=torch.float64).to(dtype)
    data.reshape(-1)[::2] = limits.min
    data.reshape(-1)[::3] = limits.smallest_normal
    assert whole(data).not_finite == 0
    sick = [math.nan, -math.nan] if dtype == torch.float8_e4m3fn else [math.nan, math.inf, -math.inf]
    places = sorted({0, data.numel() // 3, data.numel() // 2, data.numel() - 1})
    for count, place in enumerate(places, start=1):
        data.reshape(-1)[place] = sick[count % len(sick)]
        assert whole(data).not_finite == count
