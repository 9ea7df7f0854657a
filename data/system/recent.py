"""A cache of the values used last."""

import threading
from collections import OrderedDict
from collections.abc import Callable


class Recent[K, V]:
    """Values by key, up to a number of them or a total weight; those unused for longest go first, the newest never.

    Safe for threads. Two that make the same value at once both do the work; the first value is kept.
    """

    def __init__(
        self, *, most: float = float("inf"), most_weight: float = float("inf"), weigh: Callable[[V], int] = lambda _: 0
    ) -> None:
        """most: values kept; most_weight: what they weigh in all, in the unit of `weigh`."""
        self._most, self._most_weight, self._weigh = most, most_weight, weigh
        self._lock = threading.Lock()
        self._values: OrderedDict[K, V] = OrderedDict()
        self.weight = 0
        """Of all that is kept."""

    def get(self, key: K) -> V | None:
        """The value, which was used now; None if it is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def keep(self, key: K, value: V) -> V:
        """Keep a value. -> what is kept under its key: an earlier one if there is one."""
        with self._lock:
            if key in self._values:
                return self._values[key]
            self._values[key] = value
            self.weight += self._weigh(value)
            while len(self._values) > 1 and (len(self._values) > self._most or self.weight > self._most_weight):
                self.weight -= self._weigh(self._values.popitem(last=False)[1])
            return value

    def drop(self, key: K, value: V) -> None:
        """Keep this value no longer, if it is the one that is kept."""
        with self._lock:
            if self._values.get(key) is value:
                self.weight -= self._weigh(self._values.pop(key))
