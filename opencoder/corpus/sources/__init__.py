"""The forms a source can have, one module each; `opencoder.corpus.read` puts them together."""
