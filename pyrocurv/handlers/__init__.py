"""Pyro effect handlers, and the sites, modules and layers that a Pyro model consists of."""
