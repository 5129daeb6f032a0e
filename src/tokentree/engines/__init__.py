"""Engines: whatever holds weights and KV and can verify a tree."""
