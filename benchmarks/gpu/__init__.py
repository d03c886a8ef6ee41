"""What a CPU cannot tell, measured on one GPU in at most eight minutes: `python -m benchmarks.gpu`, see `__main__.py`."""
