"""The parts of `examples/image_classification.py`: data, networks, methods, evaluation, report."""
