"""Heads that draft for a target model: modules that drafters and trainers share, and their checkpoints."""
