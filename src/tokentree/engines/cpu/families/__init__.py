"""Families of models whose forward is one compiled call: a file each."""
