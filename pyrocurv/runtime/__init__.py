"""State of torch that is changed for a while and restored; warnings and checks for users."""
