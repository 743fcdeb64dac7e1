"""What each call of the file store does in its thread. Synchronous; one call here is one job.

Strategy: reads take the files one by one, without a lock. Changes are grouped by shelf, each shelf locked once, and
made in order there. An item's trouble is its own outcome; a call has trouble as a whole only where no item could be
done, or where its answer has no room for an item's error.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeVar

from .._exceptions import StoreError, StoreFullError
from .._frame import HEAD_SIZE, TOKEN, Kind, patch_head, peek, placeholder
from .._protocols import Begun, Fence, Held, Outcome, Patch, Write
from .._tokens import new_token
from ._file_folder import Folder
from ._file_memory import NotHereError
from ._file_places import Place
from ._file_reads import Reads
from ._file_shelf import LOCK_SECONDS, UNDER_WAY, Shelf, charge_of, store_error

T = TypeVar("T")


class Batches:
    """The batched operations on one folder.

    Args:
        folder: The tree.
        store: ``Store.id`` of the store whose fences count here.
        max_bytes: The largest file that may be written; None: any.

    Attributes:
        pace: Seconds that each write of the last call took.
    """

    def __init__(self, folder: Folder, store: int, max_bytes: int | None) -> None:
        self._folder = folder
        self._reads = Reads(folder.clock)
        self._store = store
        self._max_bytes = max_bytes
        self.pace = 0.0

    def get(self, keys: Sequence[bytes], size: int | None = None) -> list[bytes | None]:
        """Frames, or their first *size* bytes."""
        places = self._open(keys)
        if size is None:
            found, trouble = self._reads.read(map(self._folder.file, places))
        else:
            found, trouble = self._fronts(places, size)
        if trouble and len(trouble) == len(keys):
            raise store_error(trouble[0], self._folder.directory)
        return found

    def glance(self, key: bytes) -> bytes | None:
        """The frame of *key*, had on the event loop, without waiting.

        Raises:
            NotHereError: It can't be had so.
        """
        place = self._folder.place(key)
        memory = self._folder.memory(place.space)
        if memory is None:
            raise NotHereError
        return self._reads.glance(self._folder.file(place), memory)

    def _fronts(self, places: Sequence[Place], size: int) -> tuple[list[bytes | None], list[OSError]]:
        found: list[bytes | None] = []
        trouble: list[OSError] = []
        for place in places:
            try:
                found.append(self._folder.read(place, size))
            except OSError as error:
                trouble.append(error)
                found.append(None)
        return found, trouble

    def used(self, keys: Sequence[bytes]) -> None:
        """Note uses that were no reads."""
        trouble = self._reads.note(map(self._folder.file, self._open(keys)))
        if trouble and len(trouble) == len(keys):
            raise store_error(trouble[0], self._folder.directory)

    def begin(self, keys: Sequence[bytes], hold: float) -> list[Begun]:
        """What is there, or placeholders in its place."""
        frames = self.get(keys)
        begun = [
            None if frame is None else Begun(frame, Fence(self._store, frame[TOKEN]), leader=False) for frame in frames
        ]
        missing = [index for index, frame in enumerate(frames) if frame is None]

        lasting = hold > UNDER_WAY

        def plant(shelf: Shelf, at: int, place: Place) -> Begun:
            there = shelf.frame(place.name)
            if there is not None:
                return Begun(there, Fence(self._store, there[TOKEN]), leader=False)
            token = new_token()
            waiting = placeholder(keys[missing[at]], token, self._folder.clock(), hold)
            self._put(shelf, place, waiting, lasting=lasting)
            return Begun(None, Fence(self._store, token), leader=True)

        planted = self._each([keys[index] for index in missing], plant, make=True, lasting=lasting)
        trouble = next((one for one in planted if isinstance(one, StoreError)), None)
        if trouble is not None:
            # Nobody would know of the others, and whoever comes next would wait for them.
            ours = [
                Held(keys[index], one.fence)
                for index, one in zip(missing, planted, strict=True)
                if not isinstance(one, StoreError) and one.leader
            ]
            with suppress(StoreError):
                self.release(ours)
            raise trouble
        self._notice()
        for index, one in zip(missing, planted, strict=True):
            assert not isinstance(one, StoreError)
            begun[index] = one
        return [one for one in begun if one is not None]

    def write(self, writes: Sequence[Write]) -> list[Outcome]:
        """Store frames."""

        def put(shelf: Shelf, at: int, place: Place) -> Literal["done", "refused"]:
            write = writes[at]
            if write.fence is not None and not self._holds(shelf, place, write.fence):
                return "refused"
            try:
                self._put(shelf, place, write.frame)
            except (OSError, StoreError):
                if write.is_change and shelf.head(place.name) is not None:
                    with suppress(OSError):  # in this job, since nobody may wait for it: it must not pass for this one
                        shelf.drop(place.name)
                raise
            return "done"

        began = time.monotonic()
        outcomes = self._each([write.key for write in writes], put, make=True, lasting=True)
        self.pace = (time.monotonic() - began) / max(1, len(writes))
        self._notice()
        return [*outcomes]

    def patch(self, patches: Sequence[Patch]) -> list[Outcome]:
        """Replace heads."""

        def put(shelf: Shelf, at: int, place: Place) -> Literal["done", "refused"]:
            patch = patches[at]
            frame = shelf.frame(place.name) if self._holds(shelf, place, patch.fence) else None
            if frame is None:
                return "refused"
            self._put(shelf, place, patch.head + frame[HEAD_SIZE:])
            return "done"

        return [*self._each([patch.key for patch in patches], put, make=False, absent="refused", lasting=True)]

    def delete(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Remove; the heads of what was there."""

        def drop(shelf: Shelf, _: int, place: Place) -> bytes | None:
            head = shelf.head(place.name)
            shelf.drop(place.name)
            return head

        return _all(self._each(keys, drop, make=False, absent=None, lasting=True))

    def renew(self, held: Sequence[Held], hold: float) -> list[bool]:
        """Prolong placeholders, leases and marks that would end earlier: their stay alone, not what they say."""
        lasting = hold > UNDER_WAY

        def prolong(shelf: Shelf, at: int, place: Place) -> bool:
            frame = shelf.frame(place.name) if self._holds(shelf, place, held[at].fence) else None
            head = peek(frame) if frame is not None else None
            if frame is None or head is None or head.kind not in (Kind.PLACEHOLDER, Kind.MARK, Kind.OVER):
                return False
            until = self._folder.clock() + hold
            if until > head.keep_until:
                prolonged = patch_head(head, fresh_until=head.fresh_until, keep_until=until) + frame[HEAD_SIZE:]
                self._put(shelf, place, prolonged, lasting=lasting)
            return True

        return _all(self._each([one.key for one in held], prolong, make=False, absent=False, lasting=lasting))

    def release(self, held: Sequence[Held]) -> None:
        """Remove placeholders and leases that still stand."""

        def drop(shelf: Shelf, at: int, place: Place) -> None:
            if self._holds(shelf, place, held[at].fence):
                shelf.drop(place.name)

        _all(self._each([one.key for one in held], drop, make=False, absent=None))

    def _notice(self) -> None:
        with suppress(OSError, StoreError):  # the bound's concern; what was written is written
            self._folder.notice()

    def _open(self, keys: Sequence[bytes]) -> list[Place]:
        folder = self._folder
        places = [folder.place(key) for key in keys]
        try:
            folder.ready({place.space for place in places})
        except OSError as error:
            raise store_error(error, folder.directory) from error
        return places

    def _holds(self, shelf: Shelf, place: Place, fence: Fence) -> bool:
        head = shelf.head(place.name) if fence.store == self._store else None
        return head is not None and head[TOKEN] == fence.token

    def _put(self, shelf: Shelf, place: Place, frame: bytes, *, lasting: bool = True) -> None:
        if self._max_bytes is not None and charge_of(len(frame)) > self._max_bytes:
            raise StoreFullError(
                f"an entry of {len(frame)} bytes does not fit in {self._max_bytes}.", cure="Raise CACHE_MAX_BYTES."
            )
        shelf.put(place.name, frame, sync=lasting and self._folder.ground is not None)

    def _each(
        self,
        keys: Sequence[bytes],
        act: Callable[[Shelf, int, Place], T],
        *,
        make: bool,
        absent: Any = None,
        lasting: bool = False,
    ) -> list[T | StoreError]:
        """Do *act* for each key under its shelf's lock, in order within a shelf.

        Args:
            keys: The keys; *act* is given their position and place.
            act: Returns the item's result; what it raises is the item's error.
            make: Make shelves that are not there; otherwise their items' result is *absent*.
            absent: See *make*.
            lasting: What was done has to survive a power cut, where the folder is to be durable.
        """
        places = self._open(keys)
        groups: dict[tuple[str, int], list[int]] = {}
        for at, place in enumerate(places):
            groups.setdefault((place.space, place.shelf), []).append(at)
        results: dict[int, T | StoreError] = {}
        deadline = time.monotonic() + LOCK_SECONDS
        for shelf, group in groups.items():
            left = deque(group)
            for last in (False, False, True):  # tries, for a tree that somebody deletes while we write to it
                try:
                    with self._folder.lock(*shelf, deadline, make=make) as held:
                        while left:
                            results[left[0]] = self._one(act, held, left[0], places[left[0]])
                            left.popleft()
                except FileNotFoundError as error:
                    if not make:
                        results.update((at, absent) for at in left)
                    elif last:
                        results.update((at, store_error(error, self._folder.directory)) for at in left)
                    else:
                        continue
                except OSError as error:
                    results.update((at, store_error(error, self._folder.directory)) for at in left)
                except StoreError as error:
                    results.update((at, error) for at in left)
                break
        if lasting and self._folder.ground is not None:
            try:
                self._folder.ground.settle(groups.keys())
            except OSError as error:
                doubt = store_error(error, self._folder.directory)
                results.update((at, doubt) for at, result in results.items() if not isinstance(result, StoreError))
        return [results[at] for at in range(len(keys))]

    def _one(self, act: Callable[[Shelf, int, Place], T], shelf: Shelf, at: int, place: Place) -> T | StoreError:
        try:
            return act(shelf, at, place)
        except FileNotFoundError:
            raise  # the shelf has gone: all again in a new one
        except OSError as error:
            return store_error(error, self._folder.directory)
        except StoreError as error:
            return error


def _all(results: list[T | StoreError]) -> list[T]:
    """The results, where none is an error.

    Raises:
        StoreError: One is; the others are done all the same.
    """
    done: list[T] = []
    for result in results:
        if isinstance(result, StoreError):
            raise result
        done.append(result)
    return done
