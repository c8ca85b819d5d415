"""Ways to break the protocol, and whether the tests notice."""
