"""Everything that needs a GPU, in two calls of one command: `python -m bench.gpu_suite`."""
