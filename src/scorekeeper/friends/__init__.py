"""Friends: asking, accepting, parting."""
