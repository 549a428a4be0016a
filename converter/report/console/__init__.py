"""What the terminal shows: a file for each kind of result, and one for progress."""
