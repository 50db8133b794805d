"""Text to batches: corpora, vocabularies, token files, windows."""

from llmos_fast.data.batching import Windows, batchify, windows
from llmos_fast.data.byte_pair import BytePairTokenizer, train_byte_pair
from llmos_fast.data.corpus import Corpus, open_corpus
from llmos_fast.data.pretrained import PretrainedTokenizer, load_tokenizer
from llmos_fast.data.token_file import Tokenizer, encode_lines, open_token_file, write_token_file
from llmos_fast.data.vocabulary import Vocabulary, build_vocab, preprocess_text

__all__ = [
    "BytePairTokenizer",
    "Corpus",
    "PretrainedTokenizer",
    "Tokenizer",
    "Vocabulary",
    "Windows",
    "batchify",
    "build_vocab",
    "encode_lines",
    "load_tokenizer",
    "open_corpus",
    "open_token_file",
    "preprocess_text",
    "train_byte_pair",
    "windows",
    "write_token_file",
]
