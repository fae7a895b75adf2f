"""Holds `tqdm_ray`, under the name that the real package gives it."""
