"""State of torch that is borrowed and given back: random numbers, autocast, module state."""
