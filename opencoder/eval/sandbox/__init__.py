"""Programs that nobody has read, run where they can do no harm and cannot forge their verdict.

`pool.Sandbox` is the way in. The other modules run inside and import the standard library only."""
