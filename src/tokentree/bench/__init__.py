"""Measuring: the same prompts decoded by several methods, interleaved, in one run."""
