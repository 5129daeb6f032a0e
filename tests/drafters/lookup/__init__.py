"""Tests of what looks up what was read or written before."""
