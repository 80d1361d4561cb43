"""Tokenizer, indexed datasets, sample order, loader. Only `loader` imports torch: preprocessing starts fast."""
