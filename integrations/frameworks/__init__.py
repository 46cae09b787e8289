"""Other sparse-training frameworks: what they decide, in alternating sparse training.

Each module is imported by its full path and imports its framework when it is used, not before.
"""
