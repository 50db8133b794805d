"""The definitions of the ops in plain PyTorch: any device, any dtype, no optional import.

``llmos_fast.reference.<op>`` takes the arguments of ``llmos_fast.ops.<op>`` without ``impl``.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType


def publish(ops: ModuleType) -> None:
    """Put the functions under this package's name; late, because ops itself loads its modules."""
    for name in ops.__all__:
        globals()[name] = partial(getattr(ops, name), impl="reference")
