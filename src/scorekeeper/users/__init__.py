"""Accounts: register, log in, look up."""
