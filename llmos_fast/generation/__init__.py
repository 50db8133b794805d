"""Generation: sampling, and text from a model."""

from llmos_fast.generation.generate import generate, generate_text
from llmos_fast.generation.sampling import GREEDY, Sampling, sample

__all__ = ["GREEDY", "Sampling", "generate", "generate_text", "sample"]
