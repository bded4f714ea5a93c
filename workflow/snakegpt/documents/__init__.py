"""Documents of a raw file: plain text, JSON lines or parquet, also gzip- or zstandard-compressed.

A file's kind follows from its name, in capitals or not. Text is kept as it is (line ends, byte order
mark, NUL, any Unicode normal form); only what cannot be text is dealt with, and counted: bytes that are
no UTF-8, by `encoding_errors`, and lone surrogates, which JSON can spell and UTF-8 cannot, by tiktoken's
own rule. Memory is bounded whatever the size of a file or a document.
"""
