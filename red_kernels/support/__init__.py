"""General helpers of the package, without knowledge of edits: files, numbers, errors, progress."""
