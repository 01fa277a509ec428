"""The key tables of the encoders, a file per family: each holds `rows(config)`."""
