"""Drafters that look up what was read or written before."""
