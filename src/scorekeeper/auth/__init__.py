"""Who is asking: passwords, tokens, and the user behind a request."""
