"""The stores: one file each, bytes in and bytes out. See ``mcp_hub_cache._protocols.Store`` for their contract."""

from __future__ import annotations

from itertools import count

next_store_id = count(1).__next__
"""Ids for stores, unique in this process: a fence of one store is useless in another, even of the same kind."""
