"""From raw text to rows of tokens."""
