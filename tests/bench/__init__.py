"""Tests of measurements and their reports."""
