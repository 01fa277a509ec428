"""What AnyUp is without a framework: configuration, geometry, files, checkpoints and the catalogue of encoders."""

__version__ = "0.1.0"
