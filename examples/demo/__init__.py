"""The parts of mixtral_inference.py, one idea a file. Not installed."""
