"""Commands: one thin file each (parse, call the library, print); `opencoder NAME` is `python tools/FILE.py`."""
