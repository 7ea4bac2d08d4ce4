"""The page in the browser: its form, what runs its jobs, and its layout."""
