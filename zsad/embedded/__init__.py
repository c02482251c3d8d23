"""The small models in the box and how they were made."""
