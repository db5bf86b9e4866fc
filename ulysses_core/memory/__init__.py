"""Saves memory on long rows: each switch trades time for memory and changes no result."""

from ulysses_core.memory.save import MemoryHandle, save_memory

__all__ = ["MemoryHandle", "save_memory"]
