"""A formal model of the protocol, and what checks it; see README.md."""
