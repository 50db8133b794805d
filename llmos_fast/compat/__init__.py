"""Interfaces of other packages: ``from llmos_fast.compat import flash_attn``."""
