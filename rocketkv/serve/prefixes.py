"""Snapshots of caches after the turns of earlier requests, so that a later request reads only what is new.

A snapshot is found by a key: a digest of the settings, of the context file, and of the token ids of each turn up to the
snapshot. The snapshots of one cache form a tree; the cache is at rest in the state of its root. All are in memory, and
the least recently used ones go when they exceed a limit in bytes. One thread uses all of this.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..config import RocketKVConfig
from ..hf.cache import RocketKVCache, Snapshot
from .prompts import Turns


@dataclass(frozen=True, eq=False)
class Tree:
    """A cache, and the state in which it is at rest: empty, or after a context file.

    Attributes:
        cache: the cache.
        root: its state at rest.
        ids: the tokens of the context file; () if the root is empty.
        key: key of the root; None if it is empty.
    """

    cache: RocketKVCache
    root: Snapshot
    ids: tuple[int, ...] = ()
    key: bytes | None = None


@dataclass(frozen=True, eq=False)
class Prefix:
    """A snapshot after some turns.

    Attributes:
        tree: the snapshots of the same cache.
        snapshot: the snapshot.
        tokens: tokens that the cache has seen.
    """

    tree: Tree
    snapshot: Snapshot
    tokens: int


class Prefixes:
    """The prefixes in memory, least recently used first.

    Args:
        limit: most bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: OrderedDict[bytes, Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, keys: Sequence[bytes]) -> tuple[int, Prefix | None]:
        """Return the place in `keys` of the last one with a prefix, and the prefix, which counts as used.

        The root of its tree counts as used after it: a cache whose root is a context cannot outlive the context.
        """
        for place in range(len(keys) - 1, -1, -1):
            found = self._entries.get(keys[place])
            if found is not None:
                self._use(keys[place], found.tree)
                return place, found
        return -1, None

    def put(self, key: bytes, prefix: Prefix) -> None:
        """Add a prefix; call `trim` when the request is done."""
        self._entries[key] = prefix
        self._use(key, prefix.tree)

    def _use(self, key: bytes, tree: Tree) -> None:
        for each in (key, tree.key):
            if each is not None and each in self._entries:
                self._entries.move_to_end(each)

    def trim(self) -> int:
        """Drop the least recently used prefixes until the others are within the limit; return their bytes."""
        while (held := self.held()) > self.limit:
            self._entries.popitem(last=False)
        return held

    def clear(self) -> None:
        """Drop all prefixes."""
        self._entries.clear()

    def held(self) -> int:
        """Return the bytes of all storages that the prefixes keep alive; a shared storage counts once."""
        storages: dict[int, int] = {}
        for prefix in self._entries.values():
            for tensor in prefix.snapshot.tensors():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())


def start_key(config: RocketKVConfig, context: tuple[object, ...] = ()) -> bytes:
    """Return the key before the first turn: of the settings, and of a context file's id and version."""
    return hashlib.sha256(repr((config, context)).encode()).digest()


def keys_after(start: bytes, turns: Turns) -> list[bytes]:
    """Return the key after each turn."""
    found = []
    for turn in turns:
        start = hashlib.sha256(start + _bytes(turn)).digest()
        found.append(start)
    return found


def _bytes(ids: Iterable[int]) -> bytes:
    return array("q", ids).tobytes()
