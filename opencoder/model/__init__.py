"""The decoder in plain modules and its output heads."""
