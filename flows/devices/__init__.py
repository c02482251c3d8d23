"""One step per device: slots, child process, engines, progress."""
