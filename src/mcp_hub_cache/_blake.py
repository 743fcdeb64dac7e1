"""blake2b, the one digest that keys and names are made of.

``hashlib`` loads OpenSSL first, which takes longer than most of this package and is not where its blake2b comes from.
The standard library's ``random`` goes to the same length for the same reason.
"""

from __future__ import annotations

try:
    from _blake2 import blake2b
except ImportError:  # an interpreter that keeps it elsewhere
    from hashlib import blake2b

__all__ = ["blake2b"]
