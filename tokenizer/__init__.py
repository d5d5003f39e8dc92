"""Tokenizers: from the bytes of a document to token numbers and back."""

from tokenizer.bytes import ByteTokenizer
from tokenizer.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ByteTokenizer", "Tokenizer", "load_tokenizer"]
