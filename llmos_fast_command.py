"""The ``llmos-fast`` command. It binds OpenMP's threads and calls ``llmos_fast.cli``.

Unbound, two threads sometimes share a core while another one idles, and a product takes 40 ms
instead of 9. OpenMP reads its settings when torch loads it, and importing ``llmos_fast`` imports
torch: hence a module of its own.
"""

import os
import sys
from collections.abc import Collection, Mapping, Sequence

_PLACED = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
_COUNTED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def binding(
    environment: Mapping[str, str], arguments: Sequence[str], processors: Collection[int]
) -> dict[str, str]:
    """Settings for one thread on each core of ``processors``, in their order.

    None where the user has placed the threads, or asks for fewer than there are processors: two
    such processes side by side would share the first cores. Places are cores, because the first
    processors may be the two of one core.
    """
    counts = [environment[name] for name in _COUNTED if name in environment]
    fewer = any(not (n.isdecimal() and int(n) >= len(processors)) for n in counts)
    fewer = fewer or any(argument.startswith("--threads") for argument in arguments)
    placed = any(name in environment for name in _PLACED)
    topology = f"/sys/devices/system/cpu/cpu{min(processors)}/topology/thread_siblings_list"
    if fewer or placed or len(processors) < 2 or not os.path.exists(topology):
        return {}
    return {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}


def main() -> None:
    """Run the command line of this process and exit."""
    processors = os.sched_getaffinity(0)
    settings = binding(os.environ, sys.argv[1:], processors)
    os.environ.update(settings)
    import torch  # noqa: F401

    # OpenMP has bound this thread too, and what it starts (tokenizers' threads) would share its
    # core; where the others are bound, this one finds the free core
    os.sched_setaffinity(0, processors)
    for name in settings:
        del os.environ[name]
    from llmos_fast import cli

    cli.main()
