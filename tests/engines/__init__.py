"""Tests of what verifies."""
