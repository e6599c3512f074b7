"""How long a test waits for a process or a thread: to find one that hangs, not to tell how busy the machine is."""

from __future__ import annotations

HANGS = 900.0  # seconds
