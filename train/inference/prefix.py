"""The prefix cache: pages and Mamba-2 states at the ends of blocks of earlier texts, found by a hash of their tokens.

    root --tokens of block 1--> key 1 --tokens of block 2--> key 2 ...      key = SHA-256(key before, tokens)
    key --> pages of the block, states after the block

A text that begins with known blocks starts after the last of them. Entries are read-only and shared: pages count their
users. The least recently used entry is removed first. Using an entry also uses all entries before it, so a chain loses its
end first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.inference.pools import Pools


@dataclass(frozen=True)
class Block:
    """The entry at the end of one block."""

    pages: dict[str, list[tuple[int, int]]]
    """By kind of attention layer: (page of the text, page of the pool). For `w`, only pages that tokens after the block see."""
    snapshot: int
    """Number of the snapshot of the Mamba-2 states; -1 in a model without such layers."""


class PrefixCache:
    """Stores at most `capacity` blocks of `block_tokens` tokens."""

    def __init__(self, pools: Pools, *, block_tokens: int, capacity: int, root: str) -> None:
        assert block_tokens % pools.sizes.page_tokens == 0, "a block is whole pages"
        self.pools = pools
        self.block_tokens = block_tokens
        self.capacity = capacity
        self._root = hashlib.sha256(root.encode()).digest()
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()
        """Least recently used first."""

    def __len__(self) -> int:
        return len(self._blocks)

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int], blocks: int) -> None:
        """Append the missing keys of the first `blocks` blocks of a text to `keys`."""
        size = self.block_tokens
        for index in range(len(keys), blocks):
            part = np.asarray(tokens[index * size : (index + 1) * size], np.int64).tobytes()
            keys.append(hashlib.sha256((keys[-1] if keys else self._root) + part).digest())

    def known(self, keys: Sequence[bytes]) -> int:
        """How many of the given blocks are stored, from the first on."""
        return next((index for index, key in enumerate(keys) if key not in self._blocks), len(keys))

    def adopt(self, row: int, keys: Sequence[bytes]) -> int:
        """Start a row with the longest known chain of the given blocks. -> its tokens; 0 changes nothing."""
        known = self.known(keys)
        if not known:
            return 0
        tokens, chain = known * self.block_tokens, [self._blocks[key] for key in keys[:known]]
        for kind, group in self.pools.groups.items():
            first = group.first_seen(tokens)
            shared = [pair for block in chain for pair in block.pages[kind] if pair[0] >= first]
            group.adopt(row, shared, tokens // group.page_tokens)
        if chain[-1].snapshot >= 0:
            self.pools.copy_states(self.pools.snapshot_slot(chain[-1].snapshot), row)
        self._touch(keys[:known])
        return tokens

    def store(self, row: int, keys: Sequence[bytes]) -> None:
        """Store the last of the given blocks, whose end the row has just read. It is not stored if a block before it is missing.
        A full cache removes another block, but none of those before it."""
        if keys[-1] in self._blocks:
            self._touch(keys)
            return
        if any(key not in self._blocks for key in keys[:-1]):
            return
        if len(self) >= self.capacity and not self.evict(but=keys):
            return
        end = len(keys) * self.block_tokens
        pages: dict[str, list[tuple[int, int]]] = {}
        for kind, group in self.pools.groups.items():
            first = max((end - self.block_tokens) // group.page_tokens, group.first_seen(end))
            pages[kind] = [(place, int(group.table[row, place])) for place in range(first, end // group.page_tokens)]
            for _, page in pages[kind]:
                group.pages.share(page)
        snapshot = -1
        if self.pools.states:
            snapshot = self.pools.snapshots.take()
            self.pools.copy_states(row, self.pools.snapshot_slot(snapshot))
        self._blocks[keys[-1]] = Block(pages, snapshot)
        self._touch(keys)

    def evict(self, *, but: Sequence[bytes] = ()) -> bool:
        """Remove the least recently used block that is not among `but`. -> whether there was one."""
        kept = set(but)
        key = next((key for key in self._blocks if key not in kept), None)
        if key is None:
            return False
        block = self._blocks.pop(key)
        for kind, pages in block.pages.items():
            for _, page in pages:
                self.pools.groups[kind].pages.release(page)
        if block.snapshot >= 0:
            self.pools.snapshots.release(block.snapshot)
        return True

    def clear(self) -> None:
        """Remove all blocks, for example after a change of weights."""
        while self.evict():
            pass

    def _touch(self, chain: Sequence[bytes]) -> None:
        for key in reversed(chain):
            self._blocks.move_to_end(key)
