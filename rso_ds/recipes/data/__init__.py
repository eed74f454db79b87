"""Text into tokens: corpora, tokenizers, packed datasets, reading ahead."""
