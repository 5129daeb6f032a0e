"""Forwards on CPUs: packed weights, own attention, whole forwards in one compiled call."""
