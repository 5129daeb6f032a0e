"""Forwards that are recorded as a graph, or compiled by torch."""
