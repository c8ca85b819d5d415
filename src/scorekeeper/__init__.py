"""The reference service: users and authentication of a card-game score keeper."""
