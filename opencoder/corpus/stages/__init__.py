"""The tasks of a corpus build, for the engine (opencoder.corpus.engine): each a pure function of its input files and
parameters. opencoder.corpus.build says which there are and what each reads."""
