"""Report of an inserted-lesion study."""
