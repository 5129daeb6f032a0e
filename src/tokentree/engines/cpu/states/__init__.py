"""Recurrent states on CPUs: one file for each kind, and how a model's own modules come to use them."""
