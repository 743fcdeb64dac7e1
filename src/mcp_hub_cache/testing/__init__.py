"""For tests of programs that use the cache, and of new stores: shipped, public, and used by this project's own tests.

- ``FaultProxy``: stands in front of a server, and breaks the network on command.
- ``FaultyStore``: stands in front of a store, and fails or hangs on command; ``faulty`` gives a cache over one, and
  ``as_default`` lets ``@acached`` use it.
- ``FakeClock``: time that moves only when told to.
- ``StoreConformance``: subclass it, give it two instances of a store, and every promise of ``Store`` is checked on the
  real thing.
"""

from __future__ import annotations

from ._conformance import StoreConformance
from ._conformance_setting import entry_frame
from ._faults import FakeClock, Fault
from ._faulty import FaultyStore, as_default, faulty
from ._links import Link
from ._proxy import FaultProxy

__all__ = [
    "FakeClock",
    "Fault",
    "FaultProxy",
    "FaultyStore",
    "Link",
    "StoreConformance",
    "as_default",
    "entry_frame",
    "faulty",
]
