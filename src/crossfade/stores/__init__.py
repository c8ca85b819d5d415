"""The only code that talks to a database: one module per store, and the translation of their errors."""
