"""Devices: one step per device, child processes, engines and progress."""
