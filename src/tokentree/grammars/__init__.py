"""Texts under a grammar: what may come after a text, and drafts that hold nothing else."""
