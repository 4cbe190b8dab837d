"""The development host: a real ComfyUI for the tests and the demo. Not part of the pack that ships."""
