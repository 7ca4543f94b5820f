"""A study: many runs on the same records, compared honestly."""
