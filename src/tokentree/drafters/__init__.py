"""Drafters: whatever proposes candidates. Each is one file and one line in `tokentree.drafters.names`."""
