"""A journal that outlives a full disk: its lines wait in memory, in order, until there is room again."""

import json
from collections import deque
from pathlib import Path

from dtrain.tracking.journal import Journal

MOST_WAITING = 16 * 2**20  # bytes; a line takes about half a kilobyte


class PatientJournal(Journal):
    """`append` raises nothing when the disk takes no line; each later one tries again, and so does `close`.

    Of more than MOST_WAITING the oldest lines are given up; once there is room a "fault" line says which.
    """

    def __init__(self, path: str | Path, rank: int = 0):
        super().__init__(path, rank)
        self.problem: str | None = None  # why lines wait; None while none does
        self._waiting: deque[tuple[bytes, bool]] = deque()
        self._bytes = 0
        self._given_up: list[tuple[int, int]] = []  # (step, images) of the first and the last line given up
        self._number_given_up = 0

    @property
    def unwritten(self) -> int:
        """Lines that are not in the file."""
        return len(self._waiting) + self._number_given_up

    def begin_attempt(self, *args, **kwargs) -> int:
        """As of any journal; raises OSError, because an attempt that the journal does not know of must not train."""
        number = super().begin_attempt(*args, **kwargs)
        if self.problem is not None:
            self._waiting.clear()
            self._bytes = 0
            raise OSError(f"cannot write {self.path}: {self.problem}")
        return number

    def close(self) -> None:
        if self._waiting:
            self._write_waiting()
        super().close()

    def _write(self, line: bytes, synced: bool) -> None:
        self._waiting.append((line, synced))
        self._bytes += len(line)
        self._write_waiting()
        while self._bytes > MOST_WAITING:
            self._give_up(self._waiting.popleft()[0])

    def _write_waiting(self) -> None:
        try:
            if self._given_up:
                super()._write(self._confession(), True)
                self._given_up, self._number_given_up = [], 0
            while self._waiting:
                line, synced = self._waiting[0]
                super()._write(line, synced)
                self._waiting.popleft()
                self._bytes -= len(line)
            self.problem = None
        except OSError as e:
            self.problem = e.strerror or str(e)

    def _give_up(self, line: bytes) -> None:
        self._bytes -= len(line)
        self._number_given_up += 1
        found = json.loads(line)
        where = (found["step"], found["images"])
        self._given_up = [self._given_up[0] if self._given_up else where, where]

    def _confession(self) -> bytes:
        (first, _), (last, images) = self._given_up
        message = f"{self._number_given_up} journal lines of steps {first} to {last} are lost: {self.problem}"
        return self._line("fault", last, images, {}, {"message": message})
