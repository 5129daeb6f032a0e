"""Tests of what proposes."""
