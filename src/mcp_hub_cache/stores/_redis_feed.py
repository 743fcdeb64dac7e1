"""What a Redis server says has changed: the feed that lets a near cache stand in front of it.

Strategy: one connection (``_redis_news``) brings the names of the keys under the cache's prefix that changed, whoever
changed them. Each moves its counter on in a table (``_changes``), which near caches look at without a call.

Rules:
- A table is trusted from the moment the server has confirmed both tracking and subscription: whatever it executes from
  then on is told. It is void the moment the connection ends; the next connection has a new table.
- What the server tells in order comes in order, so the answer to a ping proves that all it told before has arrived. The
  table is trusted for ``TRUST`` seconds from when the last answered ping was *sent*. A half-open connection, a stopped
  server, a blocked or stopped process, a loop that ended unclosed: all lose trust by the clock, without any code
  running. So a near cache never serves what was replaced more than ``TRUST`` seconds ago.
- The server tells at the end of its event loop's cycle, and not over the connection it answers on: an answer may
  overtake the news. So what this store changes itself moves its counters on when it is sent and again when it is
  answered: who took a stamp before the answer does not keep what it read.
- No NOLOOP. It would spare the echo of own writes, which costs a read at most; but the server merges the writes of one
  key in a cycle and names the last writer, so a foreign write would be kept quiet where an own one followed it; and the
  feed would have to hang on the connection that writes.
- FLUSHALL, FLUSHDB and whatever else the server tells as null voids everything. SWAPDB it does not tell.
- Nobody waits for the feed. It opens when first asked, comes back by itself with jittered pauses while it is asked, and
  where the server refuses (ACL, a proxy, no tracking) looks again about once a minute.
- A server that agrees to everything and then tells nothing is found out: this store's own writes must come back.
- Where nobody has asked for a minute the pings rest. The next question wakes them, and the table is as good as before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Sequence
from functools import partial
from typing import Any, Final
from weakref import WeakSet

from .._changes import SLOTS, Changes
from .._exceptions import StoreBusyError, StoreError, StoreExhaustedError, StoreProtocolError, StoreTimeoutError
from .._steady import steady
from ._failover_breaker import Backoff
from ._redis_clock import Clock
from ._redis_errors import lost, store_error
from ._redis_news import News, open_news
from ._redis_places import Place
from ._redis_wire import Wires

_log = logging.getLogger("mcp_hub_cache")

TRUST: Final = 3.0
"""Seconds: what a near cache serves was replaced no longer ago than this, whatever became of the connection."""
_BEAT: Final = 1.0  # seconds between pings
_MISSED: Final = 3  # beats without an answer that end the connection: beats, so that a late timer counts as one
_REST: Final = 60  # beats that nobody asked in, after which the pings rest
_FIRST_WAIT: Final = 0.1  # seconds before the first try to come back, doubled with each, before jitter
_LONGEST_WAIT: Final = 15.0
_SELDOM: Final = 60.0  # seconds between tries where the server refuses


class Feed:
    """Change counters for the keys of one cache, kept by what the server tells. Of one loop; all calls return at once.

    Args:
        loop: The running loop.
        place: The server's.
        prefix: What the keys begin with.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, place: Place, prefix: bytes) -> None:
        self._loop = loop
        self._place = place
        self._prefix = prefix
        self._words: list[int] = []  # made when somebody asks; until then own writes cost nothing here
        self._changes: Changes | None = None
        self._waiters: dict[int, list[asyncio.Future[None]]] = {}
        self._news: News | None = None
        self._opening: asyncio.Task[News] | None = None
        self._timer: asyncio.TimerHandle | None = None  # the next beat, or the next try
        self._ending: set[asyncio.Future[Any]] = set()
        self._closed = False
        self._asked = False  # since the last beat or try
        self._silence = 0  # beats without
        self._pinged: float | None = None
        self._missed = 0
        self._backoff = Backoff(_FIRST_WAIT, _LONGEST_WAIT, random.random)
        self._problem: StoreError | None = None
        self._told = False  # whether this connection has ever brought anything
        self._owed = False  # whether it should have
        self._due = False  # the same, by the ping that is on its way
        self._mute = False
        _feeds.add(self)

    def changes(self) -> Changes | None:
        """Return the table, None while nothing can be told; asks for the connection where there is none."""
        self._asked = True
        if self._timer is None and self._opening is None and not self._closed:
            self._wake()
        return self._changes

    def state(self) -> str | None:
        """How it is, for people; None: nobody has asked for it."""
        if not self._words:
            return None
        if self._changes is None:
            return f"off: {self._problem or 'connecting'}"
        # While the pings rest there is nothing to be late with.
        return "off: the server is late" if self._timer is not None and steady() >= self._changes.until else "on"

    # What has changed

    def moved(self, keys: Sequence[bytes]) -> None:
        """Move the counters of *keys* on."""
        words, waiters = self._words, self._waiters
        for key in keys:
            at = hash(key) % SLOTS
            words[at] += 2
            if waiters and at in waiters:
                _release(waiters.pop(at))

    def own(self, keys: Sequence[bytes], answer: asyncio.Future[Any]) -> None:
        """This store has just sent a change of *keys*.

        Args:
            keys: Under the prefix or not.
            answer: Its future, however it ends. Where its caller leaves early, the server's echo moves the counters.
        """
        if self._words:
            self.moved(keys)
            answer.add_done_callback(partial(self._answered, keys, self._news))

    def _answered(self, keys: Sequence[bytes], news: News | None, answer: asyncio.Future[Any]) -> None:
        self.moved(keys)
        # What was written while this connection listened, it must have told.
        if not self._told and news is self._news is not None and not answer.cancelled() and not answer.exception():
            done = answer.result()
            self._owed |= isinstance(done, list) and any(
                isinstance(outcome, str) and outcome == "done" and key.startswith(self._prefix)
                for key, outcome in zip(keys, done, strict=False)
            )

    def distrust(self) -> None:
        """Void every stamp given so far."""
        if self._changes is not None:
            self._changes = self._changes.anew()
        self._wake_all()

    async def changed(self, at: int) -> None:
        """Return when the counter *at* moves on, or all stamps are void."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiters.setdefault(at, []).append(future)
        try:
            await future
        finally:
            waiters = self._waiters.get(at, [])
            if future in waiters:
                waiters.remove(future)
                if not waiters:
                    del self._waiters[at]

    def _wake_all(self) -> None:
        waiters, self._waiters = self._waiters, {}
        for futures in waiters.values():
            _release(futures)

    def abandon(self) -> None:
        """Void everything, in a forked child: touches nothing of the parent's."""
        if self._changes is not None:
            self._changes.void()
            self._changes = None

    # What the connection brings

    def on_changed(self, news: News, keys: list[bytes] | None, /) -> None:
        """See ``Listener``."""
        if news is self._news:
            self._told = True
            if keys is None:
                self.distrust()
            else:
                self.moved(keys)

    def on_pong(self, news: News, /) -> None:
        """See ``Listener``."""
        if news is not self._news or self._pinged is None or self._changes is None:
            return
        if self._due and not self._told:
            self._mute = True
            self.on_lost(news, _mute(self._place.where))
            return
        self._changes.until, self._pinged, self._missed = self._pinged + TRUST, None, 0
        self._backoff.reset()

    def on_lost(self, news: News, error: StoreError, /) -> None:
        """See ``Listener``."""
        if news is self._news:
            self._let_go()
            self._fail(error)

    def renew(self) -> None:
        """Void everything and connect anew: the server is not the right one any more."""
        if self._news is not None:
            self.on_lost(self._news, lost(self._place.where))

    def _ping(self, news: News) -> None:
        self._place.check()
        self._pinged = steady()
        self._due = self._owed
        news.ping()

    def _beat(self) -> None:
        self._timer = None
        news = self._news
        if news is None:
            return
        self._silence = 0 if self._asked or self._waiters else self._silence + 1
        self._asked = False
        if self._pinged is not None:
            self._missed += 1
            if self._missed >= _MISSED:
                self.on_lost(news, _late(self._place.where))
                return
        elif self._silence >= _REST:
            return
        else:
            self._ping(news)
        self._timer = self._loop.call_later(_BEAT, self._beat)

    # Coming and going

    def _wake(self) -> None:
        """Go on pinging, or connect."""
        if self._news is not None:
            self._silence = 0
            self._ping(self._news)
            self._timer = self._loop.call_later(_BEAT, self._beat)
        elif not self._mute:
            if not self._words:
                self._words = [0] * SLOTS
            self._asked = False
            opening = open_news(self, self._place, self._prefix, TRUST)
            self._opening = task = self._loop.create_task(opening, name="mcp_hub_cache: feed from Redis")
            self._ending.add(task)
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[News]) -> None:
        self._ending.discard(task)
        self._opening = None
        if task.cancelled():  # closing, or the loop ends
            return
        if (error := task.exception()) is not None:
            if not self._closed:
                self._fail(store_error(error, self._place.where))
            return
        news = task.result()
        if not news.closed.done():
            self._ending.add(news.closed)
            news.closed.add_done_callback(self._ending.discard)
        if self._closed:
            news.abort()
        elif news.closed.done():
            self._fail(lost(self._place.where))
        else:
            self._begin(news)

    def _begin(self, news: News) -> None:
        self._news = news
        news.begin()
        self._told = self._owed = False
        self._silence = self._missed = 0
        # From now on, however long ago it was confirmed: nothing was read under this table yet.
        self._changes = Changes(self._words, steady, until=steady() + TRUST)
        if self._problem is not None:
            self._problem = None
            _log.info("The near cache in front of Redis is on again")
        self._ping(news)
        self._timer = self._loop.call_later(_BEAT, self._beat)

    def _let_go(self) -> None:
        """Void everything and end the connection."""
        news, self._news = self._news, None
        self._pinged = None
        if self._changes is not None:
            self._changes.void()
            self._changes = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake_all()
        if news is not None:
            news.abort()

    def _fail(self, error: StoreError) -> None:
        if self._problem is None or self._problem.kind != error.kind:
            _log.info("The near cache in front of Redis is off: %s", error)
        self._problem = error
        passes = error.outage or isinstance(error, StoreBusyError | StoreExhaustedError)
        wait = self._backoff.next() if passes else _SELDOM * random.uniform(0.5, 1.0)  # noqa: S311  # no secret
        self._timer = self._loop.call_later(wait, self._retry)

    def _retry(self) -> None:
        self._timer = None
        if self._asked:  # else whoever asks next has it connect
            self._wake()

    async def aclose(self) -> None:
        """End the connection, and return when it is over. Who waits for a change is woken."""
        self._closed = True
        self._let_go()
        if self._opening is not None:
            self._opening.cancel()
        while self._ending:
            await asyncio.wait(self._ending)


class Connections(Wires):
    """All connections of one loop: the wires and, where two or more are allowed, the feed's.

    Attributes:
        place: Where they lead.
        feed: None: there is no room for it.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        place: Place,
        timeout: float,
        clock: Clock,
        limit: int,
        *,
        prefix: bytes,
    ) -> None:
        self.place = place
        self.feed = Feed(loop, place, prefix) if limit > 1 else None
        super().__init__(loop, place, timeout, clock, limit if self.feed is None else limit - 1)

    def renew(self) -> None:
        """Fail what waits, void what the feed has told, and connect anew for what comes."""
        super().renew()
        if self.feed is not None:
            self.feed.renew()

    async def aclose(self) -> None:
        """Close all of them."""
        if self.feed is not None:
            await self.feed.aclose()
        await super().aclose()
        await self.place.aclose()


def _release(futures: Sequence[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def _late(where: str) -> StoreError:
    return StoreTimeoutError(f"Redis at {where} was late to tell what has changed.")


def _mute(where: str) -> StoreError:
    return StoreProtocolError(
        f"Redis at {where} agrees to CLIENT TRACKING and tells nothing.",
        cure="Is a proxy between? The near cache needs a connection to the server itself.",
    )


_feeds: WeakSet[Feed] = WeakSet()


def _forked() -> None:
    for feed in list(_feeds):
        feed.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
