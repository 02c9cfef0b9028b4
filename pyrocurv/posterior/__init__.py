"""The Gaussian over the weights and its natural-gradient step; torch only."""
