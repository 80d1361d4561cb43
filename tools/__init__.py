"""Commands: one file each, thin (parse, call the library, print). `opencoder NAME` and `python tools/FILE.py` are the same."""
