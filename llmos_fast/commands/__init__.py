"""The commands of ``llmos-fast``, one per file."""
