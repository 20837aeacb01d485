"""The parts of gpu_session.py, a file for each kind of question."""
