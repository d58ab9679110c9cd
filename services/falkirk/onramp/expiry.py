"""When devices end. PURE: the time, nanoseconds since 1970, is an argument.

A device's end takes effect here by itself, on the node's own clock: no word of the registry is needed, which may be away. Deadlines wait in a heap; one that was changed or
taken back stays in it until its turn comes and counts for nothing then, so a change costs a push.
"""

from __future__ import annotations

import heapq


class Expiry:
    """Deadlines by device id."""

    def __init__(self) -> None:
        self._at: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []

    def set(self, device_id: str, at_ns: int) -> None:
        """A device ends then; 0: it doesn't."""
        if not at_ns:
            self._at.pop(device_id, None)
        elif self._at.get(device_id) != at_ns:
            self._at[device_id] = at_ns
            heapq.heappush(self._heap, (at_ns, device_id))

    def due(self, now_ns: int) -> list[str]:
        """Devices that have ended, each once."""
        found = []
        while self._heap and self._heap[0][0] <= now_ns:
            at_ns, device_id = heapq.heappop(self._heap)
            if self._at.get(device_id) == at_ns:
                del self._at[device_id]
                found.append(device_id)
        return found

    def __len__(self) -> int:
        return len(self._at)
