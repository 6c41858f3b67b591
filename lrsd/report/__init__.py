"""What was done, for people: tables and lines for a terminal, and a page with pictures."""
