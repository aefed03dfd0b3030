"""dtrain: train diffusion models at cluster scale. Importing it imports no torch."""

__version__ = "0.1.0"
