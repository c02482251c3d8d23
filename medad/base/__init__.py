"""Common base of all methods: errors, settings, files, devices. zsad imports only this and `reporting` from medad."""
