"""The parts of `examples/text.py`: text, methods, generation, report."""
