"""How fast merging is: steps timed side by side, and their table."""
