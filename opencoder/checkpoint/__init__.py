"""Sharded checkpoints that load at any layout, and exchange with Hugging Face."""
