"""Tests of training of heads."""
