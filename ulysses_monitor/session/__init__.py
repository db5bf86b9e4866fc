"""One open run: engine, capture, steering, recording, and the pipeline of a step.

Import from the modules: `settings` is read without torch, `session` is not.
"""
