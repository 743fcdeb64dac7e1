"""For tests of programs that use the cache, and of new stores: shipped, public, and used by this project's own tests.

- ``StoreConformance``: subclass it, give it two instances of a store, and every promise of ``Store`` is checked on the
  real thing.
- ``FakeClock``: time that moves only when told to.
- ``FaultyStore``: wraps a store and fails or hangs on command.
"""

from __future__ import annotations

from ._conformance import StoreConformance
from ._conformance_setting import entry_frame
from ._faults import FakeClock, FaultyStore

__all__ = ["FakeClock", "FaultyStore", "StoreConformance", "entry_frame"]
