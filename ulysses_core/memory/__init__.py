"""Memory for long rows: switches that each give time for memory, and change no number."""

from ulysses_core.memory.save import MemoryHandle, save_memory

__all__ = ["MemoryHandle", "save_memory"]
