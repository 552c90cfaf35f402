"""A thinner model: one module a technique, one protocol for all, one packed file format."""
