"""The memory of an inference engine: pages of keys and values, slots of Mamba-2 states, and their users.

    text --page table (row, page of the text -> page of the pool)--> keys, values of every layer of a group
    text --slot--> convolution and scan state of every Mamba-2 layer

All of it is allocated once; its bytes are `launch.plan.cost.inference.cache_bytes`. `*` layers are one group and `w` layers
another: the layers of a group use the same page numbers. A page may belong to several texts and to the prefix cache; it is
free when the last of them has released it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch

from launch.plan.cost.inference import CacheBytes, CacheSizes
from recipes.schema.model import ModelConfig
from recipes.schema.pattern import ATTENTION, layer_kinds
from train.model.context import KeyPool, MambaPool


def memory_budget(given: int | None, device: torch.device, *, tensor: int) -> int | None:
    """Bytes that pools may take: the given ones, or nine tenths of the device's free memory. None: no limit, because several
    tensor ranks need equal pools but may see different free memory."""
    if given is not None or tensor > 1:
        return given
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return free * 9 // 10


class FreeList:
    """Hands out the numbers 0 to count - 1. It counts the users of each number; a number without users is free."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._users: Counter[int] = Counter()

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """Take a free number, for one user. The caller has checked that there is one."""
        number = self._free.pop()
        self._users[number] = 1
        return number

    def share(self, number: int) -> None:
        """Add a user of a number."""
        self._users[number] += 1

    def release(self, number: int) -> None:
        """Remove a user of a number."""
        self._users[number] -= 1
        if not self._users[number]:
            del self._users[number]
            self._free.append(number)


@dataclass
class PageGroup:
    """The page tables of the attention layers that see the same keys: all `*` layers, or all `w` layers."""

    page_tokens: int
    window: int | None
    """Number of tokens that a query sees; None: all before it."""
    pages: FreeList
    table: np.ndarray
    """[rows, pages of a text] int32: page of the pool for each page of the text. Entries outside `spans` are undefined."""
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    """For each row: the first stored page of the text, and the one after the last."""

    def missing(self, row: int, tokens: int) -> int:
        """Number of pages that the row needs in addition to store its first `tokens` tokens."""
        _, end = self.spans.get(row, (0, 0))
        return max(0, -(-tokens // self.page_tokens) - end)

    def extend(self, row: int, tokens: int) -> None:
        """Take the missing pages. The caller has checked that enough are free."""
        first, end = self.spans.get(row, (0, 0))
        for _ in range(self.missing(row, tokens)):
            self.table[row, end] = self.pages.take()
            end += 1
        self.spans[row] = (first, end)

    def adopt(self, row: int, shared: list[tuple[int, int]], end: int) -> None:
        """Start a row with shared pages: (page of the text, page of the pool), in order and without gaps up to `end`."""
        for place, page in shared:
            self.pages.share(page)
            self.table[row, place] = page
        self.spans[row] = (shared[0][0] if shared else end, end)

    def fork(self, source: int, row: int, tokens: int) -> tuple[int, int] | None:
        """Start `row` with the first `tokens` tokens of `source`: whole pages are shared. -> the page to copy and the new page of
        its copy; None if the tokens end with a page. The caller has checked that a page is free."""
        whole, rest = divmod(tokens, self.page_tokens)
        first = self.first_seen(tokens)
        self.adopt(row, [(place, int(self.table[source, place])) for place in range(first, whole)], whole)
        if not rest:
            return None
        self.extend(row, tokens)
        return int(self.table[source, whole]), int(self.table[row, whole])

    def first_seen(self, tokens: int) -> int:
        """The first page that token number `tokens` (the next one) or a later one sees."""
        return 0 if self.window is None else max(0, tokens - self.window + 1) // self.page_tokens

    def slide(self, row: int, tokens: int) -> None:
        """Release the pages that token number `tokens` and all later ones do not see."""
        if self.window is None:
            return
        first, end = self.spans[row]
        keep = min(self.first_seen(tokens), end)
        for place in range(first, keep):
            self.pages.release(int(self.table[row, place]))
        self.spans[row] = (max(first, keep), end)

    def cut(self, row: int, tokens: int) -> None:
        """Let go of the pages after the first `tokens` tokens of a row, which stay."""
        first, end = self.spans[row]
        keep = max(first, -(-tokens // self.page_tokens))
        for place in range(keep, end):
            self.pages.release(int(self.table[row, place]))
        self.spans[row] = (first, min(end, keep))

    def drop(self, row: int) -> None:
        """Release all pages of a row."""
        first, end = self.spans.pop(row, (0, 0))
        for place in range(first, end):
            self.pages.release(int(self.table[row, place]))


class Pools:
    """All pools of an engine on this rank. Allocated once; they never grow."""

    def __init__(
        self, model: ModelConfig, sizes: CacheSizes, *, dtype: torch.dtype, device: torch.device, tensor: int = 1
    ) -> None:
        self.sizes, self.device = sizes, device
        self._kinds = kinds = layer_kinds(model.pattern)
        heads, groups = model.mamba_heads // tensor, model.mamba_groups // tensor
        channels = heads * model.mamba_head_dim + 2 * groups * model.mamba_state
        slots, wide = sizes.rows + sizes.snapshots, torch.promote_types(dtype, torch.float32)
        self.keys: dict[int, KeyPool] = {}
        self.states: dict[int, MambaPool] = {}
        for number, kind in enumerate(kinds, start=1):
            if kind in ATTENTION:
                pages = sizes.window_pages if kind == "w" else sizes.pages
                shape = (pages, sizes.page_tokens, model.kv_heads // tensor, model.head_dim)
                keys, values = torch.zeros(2, *shape, dtype=dtype, device=device).unbind()
                self.keys[number] = KeyPool(keys, values)
            elif kind == "M":
                conv = torch.zeros(slots, model.mamba_conv - 1, channels, dtype=wide, device=device)
                scan = torch.zeros(slots, heads, model.mamba_state, model.mamba_head_dim, dtype=wide, device=device)
                width = channels + heads * model.mamba_head_dim + heads
                inputs = torch.zeros(sizes.trial_tokens, width, dtype=wide, device=device)
                self.states[number] = MambaPool(conv, scan, inputs)
        self.groups: dict[str, PageGroup] = {
            kind: PageGroup(
                page_tokens=sizes.page_tokens,
                window=model.window_tokens if kind == "w" else None,
                pages=FreeList(sizes.window_pages if kind == "w" else sizes.pages),
                table=np.zeros((sizes.rows, sizes.pages_of_a_text), np.int32),
            )
            for kind in ATTENTION
            if kind in kinds
        }
        self.snapshots = FreeList(sizes.snapshots)

    def table(self, kind: str) -> torch.Tensor:
        """The page table of a kind of attention layer, [rows, pages of a text] int32, as layers read it."""
        return torch.from_numpy(self.groups[kind].table).to(self.device)

    def bytes(self) -> CacheBytes:
        """Allocated bytes, counted from the tensors."""
        return CacheBytes(
            keys_values=sum(pool.keys.nbytes + pool.values.nbytes for pool in self.keys.values()),
            mamba_states=sum(pool.conv.nbytes + pool.scan.nbytes for pool in self.states.values()),
            page_tables=sum(group.table.nbytes for group in self.groups.values()),
            trial_inputs=sum(pool.inputs.nbytes for pool in self.states.values()),
        )

    def fits(self, row: int, tokens: int) -> bool:
        """Whether the first `tokens` tokens of a row fit into the row's pages and the free pages."""
        return all(group.missing(row, tokens) <= group.pages.free for group in self.groups.values())

    def extend(self, row: int, tokens: int) -> None:
        """Take the pages for the first `tokens` tokens of a row. Call `fits` first."""
        for group in self.groups.values():
            group.extend(row, tokens)

    def slide(self, row: int, tokens: int) -> None:
        """Release pages outside of windows when a row has `tokens` tokens."""
        for group in self.groups.values():
            group.slide(row, tokens)

    def cut(self, row: int, tokens: int) -> None:
        """Let go of pages after the first `tokens` tokens of a row: later tokens were taken back."""
        for group in self.groups.values():
            group.cut(row, tokens)

    def drop(self, row: int) -> None:
        """Release all pages of a row."""
        for group in self.groups.values():
            group.drop(row)

    @property
    def fits_fork(self) -> bool:
        """Whether `fork` finds the page that it may need of each kind."""
        return all(group.pages.free for group in self.groups.values())

    def fork(self, source: int, row: int, tokens: int) -> None:
        """Start `row` as a copy of `source`, which has `tokens` tokens: states are copied, whole pages shared."""
        copied = {kind: group.fork(source, row, tokens) for kind, group in self.groups.items()}
        for number, pool in self.keys.items():
            pages = copied[self._kinds[number - 1]]
            if pages is not None:
                pool.keys[pages[1]], pool.values[pages[1]] = pool.keys[pages[0]], pool.values[pages[0]]
        self.copy_states(source, row)

    def snapshot_slot(self, number: int) -> int:
        """Slot of snapshot `number`: the snapshots come after the slots of the rows."""
        return self.sizes.rows + number

    def copy_states(self, source: int | Sequence[int], target: int | Sequence[int]) -> None:
        """Copy the Mamba-2 states of one slot to another, or of several slots, in all layers."""
        for pool in self.states.values():
            pool.conv[target] = pool.conv[source]
            pool.scan[target] = pool.scan[source]
