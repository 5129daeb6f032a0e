"""Tools: what a template is told of them, how a text calls them, and grammars that make it do so."""
