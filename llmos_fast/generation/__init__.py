"""Generation: sampling, beams, speculation, and text from a model."""

from llmos_fast.generation.beam_search import beam_search
from llmos_fast.generation.conversation import Conversation
from llmos_fast.generation.decoder import CachedDecoder, Decoder, decoder_of
from llmos_fast.generation.generate import (
    Generation,
    banned_ids,
    encode_prompt,
    generate,
    generate_text,
    stop_ids_of,
    stream,
    stream_text,
)
from llmos_fast.generation.sampling import GREEDY, Sampling, sample
from llmos_fast.generation.speculative import Acceptance, DraftModel, PromptLookup, speculate
from llmos_fast.generation.stopping import StopTexts

__all__ = [
    "GREEDY",
    "Acceptance",
    "CachedDecoder",
    "Conversation",
    "Decoder",
    "DraftModel",
    "Generation",
    "PromptLookup",
    "Sampling",
    "StopTexts",
    "banned_ids",
    "beam_search",
    "decoder_of",
    "encode_prompt",
    "generate",
    "generate_text",
    "sample",
    "speculate",
    "stop_ids_of",
    "stream",
    "stream_text",
]
