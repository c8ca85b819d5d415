"""Whole collections at once: backfill, its rehearsal, verify. No driver is used here, only the stores."""
