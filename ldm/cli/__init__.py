"""Command lines: flags, lines of jobs, the prompt loop."""
