"""Checkpoint directories on disk: safetensors and JSON only."""
