"""What decoding bytes from outside may raise.

msgspec says ``DecodeError`` of most that is wrong, but leaves text that is no UTF-8 and lists that are nested
without end to Python's own errors. A parser of bytes that another process has written catches all three.
"""

from __future__ import annotations

import msgspec

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
