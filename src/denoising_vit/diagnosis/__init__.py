"""Know before you clean: whether a backbone has artifacts, of which kind, and whether cleaning is worth it."""
