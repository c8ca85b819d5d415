"""The demo: a legacy database moves to PostgreSQL while two service workers and an old application use it."""
