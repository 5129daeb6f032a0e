"""Tests of Medusa and EAGLE heads and their files."""
