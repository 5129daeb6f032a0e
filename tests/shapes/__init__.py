"""Tests of how trees grow and are cut."""
