"""Audit events: every security decision leaves one, in both stores."""
