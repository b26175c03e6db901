"""Training: what is minimised, how, and over what."""
