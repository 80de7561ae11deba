"""Criteria and allocators, one file each; found by the entry points in setup.cfg."""
