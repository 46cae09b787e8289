"""Alternating sparse training: several sparse sub-nets of one network from one ordinary training run."""
