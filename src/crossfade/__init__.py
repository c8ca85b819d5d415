"""Move a running application from MongoDB to PostgreSQL, and back."""
