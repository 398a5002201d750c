"""What is asked of a cache's rows: from sources, from lists, in folds."""
