"""The media of a source's rows: from a row's documents to its items, and their bytes decoded.

    MediaRows.of_documents(...) -> [(slot of the first placeholder in the row's inputs, Decoded)]

Documents of media are never cut (`data.chat.pack`), so a row has whole items only. What a row needs follows from its documents,
so it is a function of the position like the row itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data.media.decode import Decoded, decoded
from data.media.items import NAMES, Item, unpack
from data.rows.reader import TokenStream
from data.store.origins import Origin
from recipes.schema.data import MediaConfig
from recipes.schema.errors import DataError


@dataclass(frozen=True)
class MediaRows:
    """Items and bytes of the documents of one stream of tokens."""

    stream: TokenStream
    """The tokens."""
    items: TokenStream
    files: TokenStream
    config: MediaConfig
    origin: Callable[[TokenStream, int], Origin]
    """File and record of a document, for messages."""

    def items_of(self, document: int) -> list[Item]:
        """The items of a document, in the order of their slots."""
        start, stop = self.items.document_span(document)
        numbers = np.empty(stop - start, dtype=self.items.dtype)
        self.items.read(start, numbers)
        which, _ = self.items.entry_of(document)
        low, high = self.stream.document_span(document)
        where = f"{self.items.entries[which].path}.bin"
        return unpack(numbers, where=where, document_tokens=high - low, files=self.files.entries[which].documents)

    def bytes_of(self, document: int, item: Item) -> bytes:
        """The original bytes that an item of a document stands for."""
        which, _ = self.items.entry_of(document)
        start, stop = self.files.document_span(int(self.files.documents_before[which]) + item.file)
        content = np.empty(stop - start, dtype=np.uint8)
        self.files.read(start, content)
        return content.tobytes()

    def decoded_items(self, document: int) -> list[Decoded]:
        """The items of a document, decoded. DataError, naming file and record, for one that cannot be decoded any more."""
        items = self.items_of(document)
        contents: dict[int, bytes] = {}
        for item in items:
            if item.file not in contents:
                contents[item.file] = self.bytes_of(document, item)
        found: list[Decoded] = []
        try:
            for one in decoded([(item, contents[item.file]) for item in items], self.config):
                found.append(one)
        except ValueError as error:
            origin = self.origin(self.stream, document)
            kind = NAMES[items[len(found)].kind]
            raise DataError(
                f"{origin.file} record {origin.record:,}: item {len(found) + 1} ({kind}) {error}. It could be decoded when the "
                f"data was prepared: check the versions of Pillow, soundfile and av, or prepare again."
            ) from error
        return found

    def of_documents(self, documents: Sequence[tuple[int, int]]) -> list[tuple[int, Decoded]]:
        """(slot of the first placeholder among the row's inputs, item) of a row. documents: (slot of its first label, number)."""
        # The input of a slot is the label of the slot before it.
        return [(slot + one.item.slot + 1, one) for slot, document in documents for one in self.decoded_items(document)]
