"""Training: `python -m train.run`."""
