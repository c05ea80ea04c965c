"""`longrope demo`: a packaged tiny model, its text, and the eight-fold extension of its window."""
