"""Memory of a fresh process that loads a quantized 1.1B model and generates 128 tokens, as JSON.

python -m benchmarks.memory_generate

ru_maxrss outlives exec, so that a large parent would show in it; VmHWM is the process's own. Both
count pages of the memory-mapped checkpoint, which ``rss_file`` tells apart.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

PROMPT, NEW = 128, 128


def status() -> dict[str, int]:
    """Bytes, as Linux counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = {"rss": "VmRSS", "rss_anonymous": "RssAnon", "rss_file": "RssFile", "peak": "VmHWM"}
    return {name: 1024 * int(fields[field].split()[0]) for name, field in names.items()}


def measure(folder: str) -> None:
    import torch

    import llmos_fast
    from llmos_fast.generation import CachedDecoder

    after_import = status()
    start = time.perf_counter()
    model = llmos_fast.models.load(folder)
    seconds = time.perf_counter() - start
    decoder = CachedDecoder(model)  # type: ignore[arg-type]
    decoder.reserve(PROMPT + NEW)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(model.config.vocabulary, (PROMPT,), generator=generator).tolist()
    tokens = decoder.read([prompt]).argmax(-1, keepdim=True)
    after_prompt = status()
    for _ in range(NEW - 1):
        tokens = decoder.step(tokens)[:, -1].argmax(-1, keepdim=True)
    after = status()
    weights = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    needed = sum(weights.values()) + decoder.cache.nbytes
    grown = after["peak"] - after_import["rss"]
    found = {
        "after_import": after_import,
        "after_prompt": after_prompt,
        "after": after,
        "ru_maxrss": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "weights": sum(weights.values()),
        "cache": decoder.cache.nbytes,
        "load_seconds": seconds,
        "grown_by": grown,
        "grown_by_of_weights_and_cache": grown / needed,
    }
    print(json.dumps(found, indent=2))


def main() -> None:
    """A child writes the checkpoint where there is none yet, and others load it, the last warm."""
    code = "from benchmarks.bench_generate import our_checkpoint as c; print(c(*{!r}))"
    arguments = [sys.executable, "-c", code.format(("llama-1.1b", "int4-g128"))]
    folder = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.strip()
    command = [sys.executable, "-m", "benchmarks.memory_generate", folder]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
