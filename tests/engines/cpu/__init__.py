"""Tests of packed layers and own attention."""
