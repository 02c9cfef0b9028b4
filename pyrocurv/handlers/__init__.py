"""Pyro effect handlers, and what a Pyro model is made of."""
