"""One open run: engine, capture, steering, recording, and the pipeline of a step."""
