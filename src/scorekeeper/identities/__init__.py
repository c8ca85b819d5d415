"""Players as games know them; guests play before they have an account."""
