"""Compiled loops over rows, tiles and addresses."""
