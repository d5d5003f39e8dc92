"""Tokenizers: from the bytes of a document to token numbers and back."""

from tokenizer.bytes import ByteTokenizer
from tokenizer.pieces import SentencePieceTokenizer
from tokenizer.tokenizer import Tokenizer, load_tokenizer, open_tokenizer

__all__ = ["ByteTokenizer", "SentencePieceTokenizer", "Tokenizer", "load_tokenizer", "open_tokenizer"]
