"""What serves the whole package and knows nothing of edits: files, numbers, errors, progress."""
