"""Played games: kept, listed, shared."""
