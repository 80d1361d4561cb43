"""The operators in plain torch, any device, fp64-capable: their definition, their fallback and the truth in tests."""
