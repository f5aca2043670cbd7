"""The control page, shared by daemon, engines and workers: what is wanted, and what each has done."""

from __future__ import annotations

import mmap
import os

from bridge.errors import ConfigError
from vllm_patching import linux


class ControlPage:
    """One page shared by daemon, engines and workers: what is wanted, and what each of them has done.

    Single 8-byte words, each with one writer, so no lock is needed: ``requested``, ``hold``, ``writing``,
    ``writing_since_ns`` and ``restorable`` are the daemon's; an engine's slot (held, stand-still nanoseconds)
    is that engine core's; a rank's slot (version, batch, flip nanoseconds, failures, active half, flips,
    batches begun) that worker's.
    """

    MAGIC = 0x42524944_47453032
    SLOT_WORDS = 8
    ENGINE_WORDS = 2
    HEADER_WORDS = 8
    MAX_BYTES = 1 << 24

    def __init__(self, fd: int) -> None:
        """Map the page behind ``fd``, which stays open and is the page's from now on.

        Raises:
            ConfigError: it is none; ``fd`` is still the caller's then.
        """
        self.fd = fd
        try:
            size = os.fstat(fd).st_size
            if size % 8 or not 8 * self.HEADER_WORDS <= size <= self.MAX_BYTES:
                raise ConfigError(f"a file of {size} bytes was received, which is no bridge control page")
            self._map = mmap.mmap(fd, size)
        except OSError as err:
            raise ConfigError(f"what was received as the bridge's control page is no memory: {err}") from err
        self._words = memoryview(self._map).cast("Q")
        if self._words[0] != self.MAGIC:
            raise ConfigError("the file descriptor received is not a bridge control page")
        if 8 * self._words_of(self.num_ranks, self.num_engines) != size:
            raise ConfigError(
                f"the control page received has {size} bytes, and says that it is for {self.num_ranks} "
                f"rank(s) and {self.num_engines} engine core(s)"
            )

    @classmethod
    def _words_of(cls, num_ranks: int, num_engines: int) -> int:
        return cls.HEADER_WORDS + cls.SLOT_WORDS * num_ranks + cls.ENGINE_WORDS * num_engines

    @classmethod
    def create(cls, num_ranks: int, num_engines: int = 1) -> ControlPage:
        """Allocate the page for ``num_ranks`` workers, of all ``num_engines`` engine cores together."""
        fd = linux.memfd_create("bridge-control", linux.MFD_CLOEXEC)
        os.ftruncate(fd, cls._words_of(num_ranks, num_engines) * 8)
        for index, word in enumerate((cls.MAGIC, num_ranks, num_engines)):
            os.pwrite(fd, word.to_bytes(8, "little"), 8 * index)
        return cls(fd)

    @property
    def num_ranks(self) -> int:
        return self._words[1]

    @property
    def num_engines(self) -> int:
        return self._words[2]

    @property
    def requested(self) -> int:
        """The version that every rank has staged and should commit; 0 for the checkpoint's own."""
        return self._words[3]

    @requested.setter
    def requested(self, version: int) -> None:
        self._words[3] = version

    @property
    def hold(self) -> int:
        """The ticket for which every engine is asked to stand still; 0 to go on."""
        return self._words[4]

    @hold.setter
    def hold(self, value: int) -> None:
        self._words[4] = value

    @property
    def writing(self) -> int:
        """The version that is being written over the live weights; 0 where these are whole.

        Survives the daemon, as the page does: what it had begun to write is still torn after it.
        """
        return self._words[5]

    @writing.setter
    def writing(self, value: int) -> None:
        self._words[5] = value

    @property
    def writing_since_ns(self) -> int:
        """When ``writing`` began, by the monotonic clock that all processes of the host share."""
        return self._words[6]

    @writing_since_ns.setter
    def writing_since_ns(self, value: int) -> None:
        self._words[6] = value

    @property
    def restorable(self) -> int | None:
        """The version before the requested one, while every inactive half still holds it; else None.

        Survives the daemon, as the halves do.
        """
        return self._words[7] - 1 if self._words[7] else None

    @restorable.setter
    def restorable(self, version: int | None) -> None:
        self._words[7] = 0 if version is None else version + 1

    def slot(self, rank: int) -> RankSlot:
        """The words of one rank."""
        start = self.HEADER_WORDS + rank * self.SLOT_WORDS
        return RankSlot(self._words[start : start + self.SLOT_WORDS])

    def failed_ranks(self) -> list[int]:
        """Ranks with a flip that did not happen, ever; cheap, as it is asked at every batch."""
        start, words = self.HEADER_WORDS, self.SLOT_WORDS
        failures = self._words[start + RankSlot.FAILURES : start + words * self.num_ranks : words]
        return [rank for rank, count in enumerate(failures) if count] if any(failures) else []

    def engine(self, index: int) -> EngineSlot:
        """The words of one engine core, by its data-parallel index."""
        start = self.HEADER_WORDS + self.num_ranks * self.SLOT_WORDS + index * self.ENGINE_WORDS
        return EngineSlot(self._words[start : start + self.ENGINE_WORDS])

    def engines(self) -> list[EngineSlot]:
        """The words of every engine core."""
        return [self.engine(index) for index in range(self.num_engines)]


class RankSlot:
    """What one worker tells the node about its flips."""

    FAILURES, BEGUN = 3, 6  # which of its words

    def __init__(self, words: memoryview) -> None:
        self._words = words

    def record(self, *, version: int, batch: int, flip_ns: int, active: int) -> None:
        """Written by the worker after a flip; ``version`` last, as readers wait for it."""
        self._words[1] = batch
        self._words[2] = flip_ns
        self._words[4] = active
        self._words[5] += 1
        self._words[0] = version

    @property
    def words(self) -> tuple[int, ...]:
        """All of them that another node wants to know, as ``copy`` takes them."""
        return tuple(0 if index == self.BEGUN else word for index, word in enumerate(self._words))

    def copy(self, words: tuple[int, ...]) -> None:
        """Take over what the worker wrote into another node's page; the version last, as in ``record``."""
        for index in reversed(range(len(self._words))):
            self._words[index] = words[index]

    def fail(self) -> None:
        """Count a flip that did not happen."""
        self._words[self.FAILURES] += 1

    @property
    def version(self) -> int:
        return self._words[0]

    @property
    def batch(self) -> int:
        """The number of the first batch under ``version``."""
        return self._words[1]

    @property
    def flip_ns(self) -> int:
        return self._words[2]

    @property
    def failures(self) -> int:
        return self._words[self.FAILURES]

    @property
    def begun(self) -> int:
        """How many batches have begun, for whoever shares the device with them; not told to other nodes."""
        return self._words[self.BEGUN]

    @begun.setter
    def begun(self, batches: int) -> None:
        self._words[self.BEGUN] = batches

    @property
    def active(self) -> int:
        return self._words[4]

    @property
    def flips(self) -> int:
        return self._words[5]


class EngineSlot:
    """What one engine core tells the node about its stand-stills."""

    def __init__(self, words: memoryview) -> None:
        self._words = words

    @property
    def held(self) -> int:
        """The ticket for which nothing runs on any of this engine's ranks; 0 where it goes on."""
        return self._words[0]

    @held.setter
    def held(self, value: int) -> None:
        self._words[0] = value

    @property
    def stood_ns(self) -> int:
        """How long the newest stand-still lasted, in nanoseconds."""
        return self._words[1]

    @stood_ns.setter
    def stood_ns(self, value: int) -> None:
        self._words[1] = value
